"""Pairs of a source and a target as packed rows.

Letters: B rows, S source tokens of a row, T its target tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from leanbert.data.batches.batch import IGNORED, PairBatch
from leanbert.data.batches.packing import Packing, fill_rows, number_rows
from leanbert.data.store.examples import ExampleCache
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs


def output_frame(tokenizer: TextTokenizer, name: str) -> tuple[list[int], list[int]]:
    """Return the ids that begin and end an output; raises UserError if the tokenizer `name` puts none."""
    begin, end = tokenizer.template
    if not begin or not end:
        raise UserError(
            f"data.{name}: puts no token before or after a text: nothing to begin and end an output with. "
            "Choose another one"
        )
    return begin, end


@dataclass(frozen=True)
class PairCollator:
    """Makes batches of pairs: `room` is the length of rows and `pad_ids` what fills them, each (source, target)."""

    room: tuple[int, int]
    pad_ids: tuple[int, int]

    def collate(self, sources: list[list[np.ndarray]], targets: list[list[np.ndarray]]) -> PairBatch:
        """Return the batch of rows of pairs: the ids of each row's sources, and of the targets that belong to them.

        All are in their tokenizer's template, and targets are read up to the end.
        """
        read = [[target[:-1] for target in row] for row in targets]
        following = [[target[1:] for target in row] for row in targets]
        source_inputs, decoder_inputs = (
            PackedInputs.from_arrays(fill_rows(ids, room, pad_id), *number_rows(ids, room))
            for ids, room, pad_id in zip((sources, read), self.room, self.pad_ids, strict=True)
        )
        return PairBatch(source_inputs, decoder_inputs, torch.from_numpy(fill_rows(following, self.room[1], IGNORED)))

    def blank(self, rows: int) -> PairBatch:
        """Return a batch of padding."""
        nothing: list[list[np.ndarray]] = [[] for _ in range(rows)]
        return self.collate(nothing, nothing)

    def read(self, cache: ExampleCache, packing: Packing, rows: np.ndarray, key: np.ndarray) -> PairBatch:
        """Return the rows with these numbers, int64 [B], of the columns "source" and "target"."""
        groups = [packing.examples(row) for row in rows]
        return self.collate(cache.read("source", groups), cache.read("target", groups))
