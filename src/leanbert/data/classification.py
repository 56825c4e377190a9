"""Texts, or pairs of texts, with their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from leanbert.data.batches.batch import PredictBatch
from leanbert.data.batches.loading import PredictionInputs, in_batches, pad_rows
from leanbert.data.example_data import Part
from leanbert.data.formats.corpora import document_hash
from leanbert.data.formats.examples import prediction_texts, read_records, text_of
from leanbert.data.labelled import LabelledData
from leanbert.data.labels import LabelReader, Problem
from leanbert.data.samples.embedded import embedded_files
from leanbert.data.store.example_store import Example
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.models.packed_inputs import PackedInputs

ENCODED_TOGETHER = 1024
"""Texts that are given to the tokenizer at a time."""


class ClassificationData(LabelledData):
    """Texts with labels, from .jsonl, .csv and .tsv files; by default which library a docstring is of.

    Args:
        problem: single: each text has one of the labels; multi: any number of them, a list or a text with "," between
            them, or a list that says of each label whether it is given (1.0 or 0.0, true or false); regression: a
            number, or a list of numbers.
        text_field: Field of the text.
        pair_field: Field of a second text, such as a hypothesis; unset: there is none.
        label_field: Field of the label or labels.
        settings: See `LabelledData`.

    """

    fixed: ClassVar = (*LabelledData.fixed, "problem")
    counts_unknown: ClassVar = False

    def __init__(
        self,
        problem: Problem = "single",
        text_field: str = "text",
        pair_field: str | None = None,
        label_field: str = "label",
        **settings: Any,
    ) -> None:
        super().__init__(
            problem=problem, text_field=text_field, pair_field=pair_field, label_field=label_field, **settings
        )

    @property
    def problem(self) -> Problem:
        """What kind of labels there are."""
        return self.hparams["problem"]

    @property
    def slots(self) -> int:
        """Examples in a row, at most: short texts share one."""
        return max(1, int(self.hparams["max_length"]) // 8)

    def embedded(self, cache_dir: Path) -> dict[Part, Path]:
        """Return docstrings with the libraries that they are of."""
        return embedded_files("classification", cache_dir)

    def key(self, part: Part) -> list[Any]:
        """Return the settings of reading."""
        return [self.hparams[name] for name in ("problem", "text_field", "pair_field", "label_field", "label_names")]

    def places(self, part: Part) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield ("file:line", labels) of the texts of a part."""
        files = self.files(part)
        reader = self._reader(files)
        return ((place, reader.read(place, value)) for place, _, value in self._read(files, *self.held_out(part)))

    def texts(self, files: list[str]) -> Iterator[str]:
        """Yield both texts of each training example."""
        low, high = self.held_out("train")
        for _, texts, _ in self._read(files, low, high):
            yield from texts

    def encode(self, files: list[str], part: Part, facts: dict[str, Any]) -> Iterator[Example]:
        """Yield the examples; `facts` get "labels" (and "cut", the number of texts that were cut)."""
        reader, facts["cut"] = self._reader(files), 0
        for batch in in_batches(self._read(files, *self.held_out(part)), ENCODED_TOGETHER):
            encoded = encode_texts([texts for _, texts, _ in batch], self.tokenizer, self.hparams["max_length"])
            for (place, _, value), (ids, segments, needed) in zip(batch, encoded, strict=True):
                facts["cut"] += self.fit_length(place, needed)
                targets = reader.targets(place, value)
                yield {"ids": ids, "segments": segments, "index": [0], "targets": targets}
        facts["labels"] = reader.labels

    def prediction_batches(self, files: list[str], batch_size: int) -> PredictionInputs:
        """Return texts, or pairs of them, between which a line has a tab."""
        length = self.hparams["max_length"]
        return PredictionInputs(
            lambda: prediction_texts(files, self._fields),
            lambda groups: encode_groups(groups, self.tokenizer, length),
            batch_size,
            length,
        )

    @property
    def _fields(self) -> list[str]:
        return [name for name in (self.hparams["text_field"], self.hparams["pair_field"]) if name is not None]

    def _read(self, files: list[str], low: float, high: float) -> Iterator[tuple[str, list[str], Any]]:
        label = self.hparams["label_field"]
        for place, record in read_records(files, "data.train_files", (label,), self._fields):
            texts = [text_of(place, record, field) for field in self._fields]
            if low <= document_hash("\t".join(texts)) < high:
                yield place, texts, record[label]

    def _reader(self, files: list[str]) -> LabelReader:
        field, train = self.hparams["label_field"], self._given("train")

        def values() -> Iterator[Any]:
            return (value for some in (files, train) if some for _, _, value in self._read(some, 0.0, 1.0))

        return LabelReader(self.problem, field, self.named, self.hparams["label_names"], values)

    @property
    def dtypes(self) -> dict[str, str]:  # type: ignore[override]
        """Columns of the cache: numbers are floats."""
        return {**LabelledData.dtypes, "targets": "float32" if self.problem == "regression" else "int32"}


def encode_texts(
    texts: list[list[str]], tokenizer: TextTokenizer, length: int
) -> list[tuple[list[int], list[int], int]]:
    """Return (ids, segments, tokens needed) of single texts, or of pairs, in the tokenizer's template.

    A pair is `before a after b after` with segments 0 and 1, as `[CLS] a [SEP] b [SEP]`; of one that is too long the
    longer text is cut first.
    """
    before, after = tokenizer.template
    flat = tokenizer.encode_bare([text for group in texts for text in group])
    found, start = [], 0
    for group in texts:
        pieces = flat[start : start + len(group)]
        start += len(group)
        needed = len(before) + sum(len(piece) + len(after) for piece in pieces)
        while (excess := len(before) + sum(len(piece) + len(after) for piece in pieces) - length) > 0:
            longest = max(range(len(pieces)), key=lambda number: len(pieces[number]))
            others = max((len(p) for n, p in enumerate(pieces) if n != longest), default=0)
            keep = max(len(pieces[longest]) - excess, min(others, len(pieces[longest]) - 1), 0)
            pieces[longest] = pieces[longest][:keep]
        ids, segments = list(before), [0] * len(before)
        for number, piece in enumerate(pieces):
            ids += [*piece, *after]
            segments += [number] * (len(piece) + len(after))
        found.append((ids, segments, needed))
    return found


def group_batch(groups: list[list[str]], tokenizer: TextTokenizer, length: int) -> PredictBatch:
    """Return texts and pairs of texts as a padded batch [B, S <= length]."""
    return encode_groups(groups, tokenizer, length)[0]


def encode_groups(groups: list[list[str]], tokenizer: TextTokenizer, length: int) -> tuple[PredictBatch, int]:
    """Return texts and pairs of texts as a padded batch [B, S <= length], and how many were cut to fit."""
    encoded = encode_texts(groups, tokenizer, length)
    ids, positions, documents = pad_rows([ids for ids, _, _ in encoded], tokenizer.pad_id)
    segments, _, _ = pad_rows([segments for _, segments, _ in encoded], 0)
    texts = ["\t".join(group) for group in groups]
    batch = PredictBatch(PackedInputs(*map(torch.from_numpy, (ids, positions, documents, segments))), texts)
    return batch, sum(needed > length for _, _, needed in encoded)
