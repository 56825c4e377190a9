"""Examples with labels: texts with labels of their own, or words with one each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

import numpy as np

from leanbert.data.batches.batch import Batch, LabelledBatch
from leanbert.data.batches.labelled import Encoded, LabelledCollator
from leanbert.data.batches.loading import ENCODED_TOGETHER, Make, in_batches
from leanbert.data.labels import Numbering, Problem
from leanbert.data.module import RowData
from leanbert.data.settings import Part, TooLong, must_be_cut
from leanbert.data.store.examples import Example, ExampleCache, Notes
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.models.stored import ModelMetadata

NAMED_IN_ERRORS = 8
"""Labels that a message lists, at most."""


class ExampleReader(Protocol):
    """How the examples of a kind are read and encoded."""

    def read(self, files: list[str], low: float, high: float) -> Iterator[tuple[str, Any, Any]]:
        """Yield ("file:line", example, its labels as written) of the examples whose text hashes to [low, high)."""

    def texts(self, examples: Iterator[tuple[str, Any, Any]]) -> Iterator[str]:
        """Yield the texts of what `read` yields."""

    def encode(self, examples: list[Any], tokenizer: TextTokenizer, length: int) -> list[Encoded]:
        """Encode examples for rows of `length` tokens."""

    def inputs(self, files: list[str]) -> Iterator[Any]:
        """Yield what is to be answered."""

    def batch(self, inputs: list[Any], tokenizer: TextTokenizer, length: int) -> tuple[Batch, int]:
        """Return inputs as a batch, and how many of them were cut to `length`."""


class LabelledData(RowData):
    """What the data modules of labelled texts and of labelled words share.

    After `prepare` there is `labels`, in the order of the model's scores: the labels of the checkpoint or of the model
    that training starts from, if it knows all of training, else the training examples' labels in the order in which
    they come. A cache numbers its labels by itself, so that it holds for any model; rows have the model's numbers.

    Args:
        test_files: Test examples, for `test`.
        too_long: What to do with an example that is longer than a row: truncate it (they are counted and told), or
            refuse.
        label_names: Names of labels that are written as numbers from 0, in their order.
        settings: See `RowData`.

    """

    shaped_by: ClassVar = ("max_length", "too_long")
    of_words: ClassVar[bool] = False
    """Whether labels are of words. Then a label that only evaluation has counts as missed; else it is an error."""

    def __init__(
        self,
        test_files: str | list[str] | None = None,
        too_long: TooLong = "truncate",
        label_names: list[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(test_files=test_files, too_long=too_long, label_names=label_names, **settings)
        self.labels: list[str] = []
        self._start: list[str] = []  # of the model that training starts from
        self._known_by = "the training examples"

    @property
    def problem(self) -> Problem:
        """What kind of labels there are."""
        return "single"

    # ---- what a kind of data supplies

    @property
    def reader(self) -> ExampleReader:
        """Return what reads and encodes the examples, as the settings are now."""
        raise NotImplementedError

    def numbering(self, part: Part) -> Numbering:
        """Return what reads and numbers the labels of a part: here those that are lists of names."""
        return Numbering()

    # ---- examples

    def key(self, part: Part) -> list[object]:
        """Return the settings of reading, and of words whether those count that do not fit."""
        return [*super().key(part), *([part != "train"] if self.of_words else [])]

    @property
    def other_columns(self) -> dict[str, str]:  # type: ignore[override]
        """Columns of the cache besides the ids, and their types."""
        targets = "float32" if self.problem == "regression" else "int32"
        columns = {"segments": "uint8", "index": "int32", "targets": targets}
        return {**columns, "cut": "int32"} if self.of_words else columns

    def read(self, part: Part) -> Iterator[tuple[str, Any, Any]]:
        """Yield ("file:line", example, its labels as written) of the examples of a part."""
        return self.reader.read(self.files(part), *self.held_out(part))

    def texts(self) -> Iterator[str]:
        """Yield the texts of the training examples."""
        return self.reader.texts(self.read("train"))

    def inputs(self, files: list[str]) -> Iterator[Any]:
        """Yield what is to be answered out of files."""
        return self.reader.inputs(files)

    def encode_inputs(self, inputs: list[Any]) -> tuple[Batch, int]:
        """Return inputs as a batch, and how many of them were cut."""
        return self.reader.batch(inputs, self.tokenizer, self.hparams["max_length"])

    def encode(self, part: Part, notes: Notes) -> Iterator[Example]:
        """Yield the examples, and note their labels, and how many examples and words were cut."""
        numbering, length = self.numbering(part), self.hparams["max_length"]
        for batch in in_batches(self.read(part), ENCODED_TOGETHER):
            encoded = self.reader.encode([example for _, example, _ in batch], self.tokenizer, length)
            for (where, _, labels), (ids, segments, index, needed) in zip(batch, encoded, strict=True):
                notes.cut += must_be_cut(self.hparams, where, needed, length)
                cut = []
                if self.of_words:
                    labels, cut = labels[: len(index)], labels[len(index) :]
                notes.cut_words += len(cut)
                yield {
                    "ids": ids, "segments": segments, "index": index, "targets": numbering.targets(where, labels),
                    "cut": numbering.targets(where, cut) if cut and part != "train" else [],  # not learnt
                }  # fmt: skip
        notes.labels = numbering.labels

    # ---- the labels

    def metadata(self, task: str) -> ModelMetadata:
        """Return the labels besides."""
        return replace(super().metadata(task), labels=self.labels)

    def adopt(self, metadata: ModelMetadata) -> None:
        """Take over the labels of a checkpoint besides."""
        super().adopt(metadata)
        self.labels, self._known_by = metadata.labels or [], "the model"

    def start_from(self, metadata: ModelMetadata) -> None:
        """Number labels as the model does that training starts from, if it knows them all, and so keep its head."""
        if (metadata.problem or "single") == self.problem:
            self._start = metadata.labels or []

    def names(self, part: Part) -> list[str]:
        """Return the labels, and after them those that only a part for evaluation has."""
        return [*self.labels, *self._unknown(self.cache(part))]

    def named(self, where: str, label: int | str) -> str:
        """Return the name of a label that may be written as a number.

        Raises UserError: it is not among `data.label_names`, or no UTF-8 can spell it. Names the `where`.
        """
        names, text = self.hparams["label_names"], str(label)
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise UserError(f"{where}: label {label!a} holds half a character. Write whole ones")
        if names is None or label in names:
            return text
        if not text.isdecimal() or int(label) >= len(names):
            raise UserError(
                f"{where}: label {label!r} is neither a name nor a number of the {len(names)} of data.label_names "
                f"({listed(names)}). Correct it, or complete the names"
            )
        return names[int(label)]

    def cache(self, part: Part) -> ExampleCache:
        """Return the examples of a part, of which the labels are known."""
        if part != "train" and not self.labels:
            self.cache("train")
        return super().cache(part)

    def check(self, part: Part, cache: ExampleCache) -> None:
        """Choose the labels of a new run; say what was cut, and what that does to the score."""
        super().check(part, cache)
        if part != "train" and cache.notes.cut_words:
            say(f"data.{part}_files: {cache.notes.cut_words:,} words of them are not read: their spans count as missed")
        if not self.labels:
            self.labels = self._choose(cache.notes.labels)
        self._check_labels(part, cache)

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
        return [label for label in cache.notes.labels if label not in known]

    def _check_labels(self, part: Part, cache: ExampleCache) -> None:
        """Raise UserError for labels that the model does not have, or name those that only evaluation has."""
        files, unknown = f"data.{part}_files", self._unknown(cache)
        if self.problem == "regression":
            here, there = len(cache.notes.labels), len(self.labels)
            if here != there:
                raise UserError(f"{files}: examples have {here} numbers, {self._known_by} {there}. Give {there}")
        elif unknown and self.of_words and part != "train":
            say(f"{files}: {listed(unknown)} not among the labels of {self._known_by}: count as missed")
        elif unknown:
            read = self.numbering(part).read
            found = (where for where, _, labels in self.read(part) if unknown[0] in read(where, labels))
            raise UserError(
                f"{next(found, files)}: label {unknown[0]!r} is not among the {len(self.labels)} of {self._known_by} "
                f"({listed(self.labels)}). Correct it, or train a new model with it"
            )

    # ---- rows

    @property
    def collator(self) -> LabelledCollator:
        """What makes batches of the values of examples."""
        return LabelledCollator(self.room[0], self.slots, self.tokenizer.pad_id, self.problem, len(self.labels))

    def batches_of(self, part: Part, training: bool) -> Make:
        """Return what makes batches of a part, with the model's numbers of the labels."""
        cache, number = self.cache(part), {label: number for number, label in enumerate(self.names(part))}
        numbers = [] if self.problem == "regression" else [number[label] for label in cache.notes.labels]
        return partial(self.collator.read, cache, self.packing(part), np.asarray(numbers, dtype=np.int64))

    def blank_batch(self, rows: int, *, validation: bool = False) -> LabelledBatch:
        """Return a batch of padding in the shapes of a real one."""
        return self.collator.blank(rows)


def listed(labels: Sequence[str]) -> str:
    """Return the first labels for a message."""
    more = ", ..." if len(labels) > NAMED_IN_ERRORS else ""
    return ", ".join(map(str, labels[:NAMED_IN_ERRORS])) + more
