"""Examples with labels as packed rows: texts with labels of their own, or words with one each.

Letters: B rows, S row length, M targets per row, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from leanbert.data.batches.batch import IGNORED, LabelledBatch
from leanbert.data.batches.loading import locate
from leanbert.data.batches.packing import PADDING_DOCUMENT, Packing
from leanbert.data.example_data import ExampleData, Part
from leanbert.data.labels import Problem
from leanbert.data.store.example_store import ExampleCache
from leanbert.errors import UserError
from leanbert.messages import say

NAMED_IN_ERRORS = 8
"""Labels that a message lists, at most."""


class LabelledRows(Dataset[LabelledBatch]):
    """Packed rows of labelled examples; the index is an array of stream positions, the item a whole batch.

    The columns of the cache: "ids" and "segments" of an example's tokens, "index" of the labelled ones among them,
    "targets": one for each of these, or in "multi" and "regression" those of the one, and of words "cut": the targets
    of those that did not fit. Labels are numbered as the cache has them; `numbers`, int64, gives the model's.
    """

    def __init__(
        self, cache: ExampleCache, packing: Packing, length: int, slots: int, pad_id: int, problem: Problem,
        labels: int, numbers: np.ndarray, seed: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.packing, self.numbers, self.seed = cache, packing, numbers, seed
        self.length, self.slots, self.pad_id, self.problem, self.labels = length, slots, pad_id, problem, labels
        self.rows = packing.rows
        self.has_cut = "cut" in cache.dtypes and bool(cache.offsets("cut")[-1])

    def __getitem__(self, positions: np.ndarray) -> LabelledBatch:
        """Return the batch of the rows at `positions`, int64 [B]."""
        rows, _ = locate(positions, self.rows, self.seed)
        blank = blank_labelled(len(rows), self.length, self.slots, self.problem, self.labels, self.pad_id)
        columns = {name: self.cache.values(name) for name in self.cache.dtypes}
        offsets = {name: self.cache.offsets(name) for name in self.cache.dtypes}
        cut: list[list[list[int]]] = [[] for _ in rows] if self.has_cut else []
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
                if self.has_cut:
                    cut[place].append(self.numbers[value["cut"]].tolist())
                token, slot = tokens.stop, count.stop
        return LabelledBatch.from_arrays(blank, cut=cut)

    def _set_targets(self, slots: np.ndarray, values: np.ndarray) -> None:
        if self.problem == "single":
            slots[:] = self.numbers[values]
        elif self.problem == "multi":
            slots[0] = 0.0
            slots[0, self.numbers[values]] = 1.0
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

    After `prepare` there is `labels`, in the order of the model's scores: those of the checkpoint or of the model that
    training starts from, if it knows all of training, else those of the training examples, in the order in which they
    come. A cache numbers its labels by itself, so that it holds for any model; rows have the model's numbers.

    Args:
        label_names: Names of labels that are written as numbers from 0, in their order.
        settings: See `ExampleData`.

    """

    dtypes: ClassVar = {"ids": "int32", "segments": "uint8", "index": "int32", "targets": "int32"}
    counts_unknown: ClassVar[bool]
    """Whether labels that only evaluation has count as missed; else they are an error."""

    def __init__(self, label_names: list[str] | None = None, **settings: Any) -> None:
        super().__init__(label_names=label_names, **settings)
        self.labels: list[str] = []
        self._start: list[str] = []  # of the model that training starts from
        self._known_by = "the training examples"

    @property
    def problem(self) -> Problem:
        """What kind of labels there are."""
        return "single"

    # ---- what a kind of data supplies

    def places(self, part: Part) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield ("file:line", labels) of the examples of a part."""
        raise NotImplementedError

    # ---- the labels

    def facts(self) -> dict[str, Any]:
        """Return the labels besides."""
        return {**super().facts(), "labels": self.labels}

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over the labels of a checkpoint besides."""
        super().adopt(facts)
        self.labels, self._known_by = list(facts["labels"]), "the model"

    def start_from(self, facts: Mapping[str, Any]) -> None:
        """Number labels as the model does that training starts from, if it knows them all, and so keep its head."""
        if facts.get("problem", "single") == self.problem:
            self._start = list(facts["labels"])

    def names(self, part: Part) -> list[str]:
        """Return the labels, and after them those that only a part for evaluation has."""
        return [*self.labels, *self._unknown(self.cache(part))]

    def named(self, place: str, label: int | str) -> str:
        """Return the name of a label that may be written as a number.

        Raises:
            UserError: It is not among `data.label_names`, or no UTF-8 can spell it. Names the `place`.
        """
        names = self.hparams["label_names"]
        if not str(label).isascii() and str(label) != str(label).encode(errors="replace").decode():
            raise UserError(f"{place}: label {label!a} holds half a character. Write whole ones")
        if names is None or label in names:
            return str(label)
        if not str(label).isdecimal() or int(label) >= len(names):
            raise UserError(
                f"{place}: label {label!r} is neither a name nor a number of the {len(names)} of data.label_names "
                f"({listed(names)}). Correct it, or complete the names"
            )
        return names[int(label)]

    def _build(self, part: Part) -> ExampleCache:
        if part != "train" and not self.labels:
            self.cache("train")
        cache = super()._build(part)
        if not self.labels:
            self.labels = self._choose(cache.facts["labels"])
        self._check_labels(part, cache)
        return cache

    def _choose(self, found: list[str]) -> list[str]:
        """Return the labels of a new run, of which its training examples have `found`."""
        numbers = self.problem == "regression"
        if len(found) < 2 and not (numbers or (found and self.problem == "multi")):
            one = f'one label ("{found[0]}")' if found else "no label"
            raise UserError(f"data.train_files: the training examples have {one}, nothing to tell apart. Give others")
        if self._start and (len(found) == len(self._start) if numbers else set(found) <= set(self._start)):
            self._known_by = "model.init_from"
            return self._start
        if self._start:
            new = [label for label in found if label not in self._start]
            say(f"model.init_from: does not know {listed(new)}, so its output layer is made anew")
        return found

    def _unknown(self, cache: ExampleCache) -> list[str]:
        known = set(self.labels)
        return [label for label in cache.facts["labels"] if label not in known]

    def _check_labels(self, part: Part, cache: ExampleCache) -> None:
        """Raise UserError for labels that the model does not have, or name those that only evaluation has."""
        files = f"data.{part}_files"
        if self.problem == "regression":
            here, there = len(cache.facts["labels"]), len(self.labels)
            if here != there:
                raise UserError(f"{files}: examples have {here} numbers, {self._known_by} {there}. Give {there}")
        elif unknown := self._unknown(cache):
            if part == "train" or not self.counts_unknown:
                place = next((place for place, labels in self.places(part) if unknown[0] in labels), files)
                raise UserError(
                    f"{place}: label {unknown[0]!r} is not among the {len(self.labels)} of {self._known_by} "
                    f"({listed(self.labels)}). Correct it, or train a new model with it"
                )
            say(f"{files}: {listed(unknown)} not among the labels of {self._known_by}: count as missed")

    # ---- rows

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
        return LabelledBatch.from_arrays(arrays)

    def _rows(self, part: Part, seed: int | None) -> LabelledRows:
        place = {label: number for number, label in enumerate(self.names(part))}
        numbers = [] if self.problem == "regression" else [place[label] for label in self.cache(part).facts["labels"]]
        return LabelledRows(
            self.cache(part), self.packing(part), self.hparams["max_length"], self.slots, self.tokenizer.pad_id,
            self.problem, len(self.labels), np.asarray(numbers, dtype=np.int64), seed,
        )  # fmt: skip


def listed(labels: Sequence[str]) -> str:
    """Return the first labels for a message."""
    more = ", ..." if len(labels) > NAMED_IN_ERRORS else ""
    return ", ".join(map(str, labels[:NAMED_IN_ERRORS])) + more
