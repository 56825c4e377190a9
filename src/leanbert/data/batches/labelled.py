"""Examples with labels as packed rows.

Letters: B rows, S row length, M targets per row, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from leanbert.data.batches.batch import IGNORED, LabelledBatch
from leanbert.data.batches.loading import pad_rows
from leanbert.data.batches.packing import Packing, fill_rows, number_rows
from leanbert.data.labels import Problem
from leanbert.data.store.examples import ExampleCache
from leanbert.models.packed_inputs import PackedInputs


class Encoded(NamedTuple):
    """Ids and segments of an example in the tokenizer's template, and the places of the labelled ones among them.

    `needed` is the number of tokens of the whole example; words that did not fit have no place.
    """

    ids: list[int]
    segments: list[int]
    places: list[int]
    needed: int


def pad_encoded(encoded: list[Encoded], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, positions, document ids and segments of examples, one a row, padded to the longest: int64 [B, S]."""
    segments, _, _ = pad_rows([one.segments for one in encoded], 0)
    return *pad_rows([one.ids for one in encoded], pad_id), segments


@dataclass(frozen=True)
class LabelledCollator:
    """Makes batches of labelled rows: `length` tokens and at most `slots` targets in each, of so many `labels`."""

    length: int
    slots: int
    pad_id: int
    problem: Problem
    labels: int

    def collate(self, columns: Mapping[str, list[list[np.ndarray]]]) -> LabelledBatch:
        """Return the batch of rows of examples.

        `columns` has for each row the values of its examples: "ids" and "segments" of the tokens, "index" of the
        labelled ones among them, "targets": one for each of these, or in "multi" and "regression" all of the one,
        and for words "cut": the targets of the words that did not fit.
        """
        ids = columns["ids"]
        starts = [np.cumsum([0, *map(len, sequences)]) for sequences in ids]
        index = [
            [places + start for places, start in zip(some, start_of, strict=False)]
            for some, start_of in zip(columns["index"], starts, strict=True)
        ]
        rows = (fill_rows(ids, self.length, self.pad_id), *number_rows(ids, self.length))
        return LabelledBatch(
            PackedInputs.from_arrays(*rows, fill_rows(columns["segments"], self.length, 0)),
            torch.from_numpy(fill_rows(index, self.slots, 0)),
            torch.from_numpy(self._targets(columns["targets"])),
            [[labels.tolist() for labels in row] for row in columns.get("cut", [])],
        )

    def blank(self, rows: int) -> LabelledBatch:
        """Return a batch of padding, with all target slots unused."""
        nothing: list[list[np.ndarray]] = [[] for _ in range(rows)]
        return self.collate(dict.fromkeys(("ids", "segments", "index", "targets"), nothing))

    def _targets(self, rows: list[list[np.ndarray]]) -> np.ndarray:
        if self.problem == "single":
            return fill_rows(rows, self.slots, IGNORED)
        targets = np.full((len(rows), self.slots, self.labels), np.nan, dtype=np.float32)
        for row, examples in zip(targets, rows, strict=True):
            for slot, values in zip(row, examples, strict=False):
                if self.problem == "multi":
                    slot[:] = 0.0
                    slot[values] = 1.0
                else:
                    slot[:] = values
        return targets

    def read(
        self, cache: ExampleCache, packing: Packing, numbers: np.ndarray, rows: np.ndarray, key: np.ndarray
    ) -> LabelledBatch:
        """Return these rows, int64 [B]; `numbers`, int64, are the model's of the labels of the cache."""
        groups = [packing.examples(row) for row in rows]
        columns = {name: cache.read(name, groups) for name in cache.dtypes}
        if "cut" in columns and not cache.size("cut"):
            del columns["cut"]
        if self.problem != "regression":
            for name in columns.keys() & {"targets", "cut"}:
                columns[name] = [[numbers[labels] for labels in row] for row in columns[name]]
        return self.collate(columns)
