"""Examples with labels as packed rows: texts with labels of their own, or words with one each.

Letters: B rows, S row length, M targets per row, L labels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from leanbert.data.batch import LabelledBatch
from leanbert.data.example_data import ExampleData, Part
from leanbert.data.examples import ExampleCache
from leanbert.data.loading import locate
from leanbert.data.packing import PADDING_DOCUMENT, Packing
from leanbert.models.loss import IGNORED

Problem = Literal["single", "multi", "regression"]
"""One label of several, any number of them, or numbers."""


class LabelledRows(Dataset[LabelledBatch]):
    """Packed rows of labelled examples; the index is an array of stream positions, the item a whole batch.

    The columns of the cache: "ids" and "segments" of an example's tokens, "index" of the labelled ones among them, and
    "targets": one for each of these, or in "multi" and "regression" those of the one.
    """

    def __init__(
        self, cache: ExampleCache, packing: Packing, length: int, slots: int, pad_id: int, problem: Problem,
        labels: int, seed: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.packing, self.seed = cache, packing, seed
        self.length, self.slots, self.pad_id, self.problem, self.labels = length, slots, pad_id, problem, labels
        self.rows = packing.rows

    def __getitem__(self, positions: np.ndarray) -> LabelledBatch:
        """Return the batch of the rows at `positions`, int64 [B]."""
        rows, _ = locate(positions, self.rows, self.seed)
        blank = blank_labelled(len(rows), self.length, self.slots, self.problem, self.labels, self.pad_id)
        columns = {name: self.cache.values(name) for name in self.cache.dtypes}
        offsets = {name: self.cache.offsets(name) for name in self.cache.dtypes}
        for place, row in enumerate(rows):
            token = slot = 0
            for document, example in enumerate(self.packing.examples(row)):
                value = {n: columns[n][offsets[n][example] : offsets[n][example + 1]] for n in columns}
                tokens, count = slice(token, token + len(value["ids"])), slice(slot, slot + len(value["index"]))
                blank["input_ids"][place, tokens] = value["ids"]
                blank["segment_ids"][place, tokens] = value["segments"]
                blank["document_ids"][place, tokens] = document
                blank["position_ids"][place, tokens] = np.arange(len(value["ids"]))
                blank["target_index"][place, count] = value["index"].astype(np.int64) + token
                self._set_targets(blank["targets"][place, count], value["targets"])
                token, slot = tokens.stop, count.stop
        return LabelledBatch(**{name: torch.from_numpy(array) for name, array in blank.items()})

    def _set_targets(self, slots: np.ndarray, values: np.ndarray) -> None:
        if self.problem == "single":
            slots[:] = values
        elif self.problem == "multi":
            slots[0] = 0.0
            slots[0, values.astype(np.int64)] = 1.0
        else:
            slots[0] = values


def blank_labelled(rows: int, length: int, slots: int, problem: Problem, labels: int, pad_id: int) -> dict[str, Any]:
    """Return the arrays of a `LabelledBatch` of padding, with all target slots unused."""

    def filled(shape: tuple[int, ...], value: int) -> np.ndarray:
        return np.full(shape, value, dtype=np.int64)

    targets: Any = filled((rows, slots), IGNORED)
    if problem != "single":
        targets = np.full((rows, slots, labels), np.nan, dtype=np.float32)
    return {
        "input_ids": filled((rows, length), pad_id),
        "position_ids": filled((rows, length), 0),
        "document_ids": filled((rows, length), PADDING_DOCUMENT),
        "segment_ids": filled((rows, length), 0),
        "target_index": filled((rows, slots), 0),
        "targets": targets,
    }


class LabelledData(ExampleData):
    """What the data modules of labelled texts and of labelled words share.

    After `setup` there is `labels`: their names, in the order in which the training examples first have them.
    """

    dtypes: ClassVar = {"ids": "int32", "segments": "uint8", "index": "int32", "targets": "int32"}
    problem: Problem = "single"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.labels: list[str] = []

    def prepare(self) -> Any:
        """Make, or find, tokenizer and caches; the labels are those of the training examples or of the checkpoint."""
        if not self.caches:
            self.tokenizer = self._tokenizer()
            self.caches["train"] = self._build("train")
            self.labels = self.labels or list(self.caches["train"].facts["labels"])
            self.caches["val"] = self._build("val")
        return self.caches

    def facts(self) -> dict[str, Any]:
        """Return the labels."""
        return {"labels": self.labels}

    def adopt(self, facts: dict[str, Any]) -> None:
        """Take over the labels of a checkpoint."""
        self.labels = list(facts["labels"])

    def names(self, part: Part) -> list[str]:
        """Return the labels, and after them those that only a part for evaluation has."""
        return [*self.labels, *self.cache(part).facts.get("unknown", [])]

    def training_rows(self) -> LabelledRows:
        """Return rows in an order that changes with each epoch."""
        return self._rows("train", self.hparams["seed"])

    def evaluation_rows(self, part: Any) -> LabelledRows:
        """Return rows in the order of the files."""
        return self._rows(part, None)

    def blank_batch(self, rows: int, *, validation: bool = False) -> LabelledBatch:
        """Return a batch of padding in the shapes of a real one."""
        length = self.hparams["max_length"]
        arrays = blank_labelled(rows, length, self.slots, self.problem, len(self.labels), self.tokenizer.pad_id)
        return LabelledBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})

    def _rows(self, part: Part, seed: int | None) -> LabelledRows:
        return LabelledRows(
            self.cache(part), self.packing(part), self.hparams["max_length"], self.slots, self.tokenizer.pad_id,
            self.problem, len(self.labels), seed,
        )  # fmt: skip
