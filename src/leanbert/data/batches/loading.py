"""Positions of a stream to batches: the sampler, the rows to train and evaluate on, what to predict.

Letters: B rows, S row length, M targets per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset, DistributedSampler, IterableDataset

from leanbert.data.batches.batch import Batch, PredictBatch
from leanbert.data.batches.packing import fill_rows, number_rows
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.messages import say
from leanbert.models.packed_inputs import PackedInputs
from leanbert.randomness import mix, permute

Item = TypeVar("Item")

MASK_PLACEHOLDER = "[MASK]"
"""What users write, whatever the tokenizer's own mask token is."""

ENCODED_TOGETHER = 1024
"""Examples whose texts are given to the tokenizer at a time."""

_EVALUATION = 0x5EED


Make = Callable[[np.ndarray, np.ndarray], Batch]
"""Makes the batch of the rows with these numbers, int64 [B]; a key, uint64 [B], decides what is random in each."""


class Rows(Dataset[Batch]):
    """Rows of cached examples; the index is an array of stream positions, the item a whole batch.

    Position p of the training stream is row `permutation(seed, p // rows)[p % rows]`. Without a `seed`, for
    evaluation, it is row p, and what is random in it depends on nothing else. No positions are the batch `blank`.
    """

    def __init__(self, rows: int, make: Make, seed: int | None = None) -> None:
        self.rows, self.make, self.seed = rows, make, seed
        self.blank: Batch | None = None

    def __getitem__(self, positions: np.ndarray) -> Batch:
        """Return the batch of the rows at `positions`, int64 [B]."""
        if self.blank is not None and not len(positions):
            return self.blank
        if self.seed is None:
            return self.make(positions, mix(_EVALUATION, positions))
        epochs, indices = np.divmod(positions, self.rows)
        numbers = permute(indices, self.rows, self.seed, epochs)
        return replace(self.make(numbers, mix(self.seed, epochs, numbers)), row_numbers=numbers.tolist())


@dataclass(eq=False)
class PositionSampler(DistributedSampler[np.ndarray]):
    """Yields `batches` arrays of stream positions, from `start()` on; a rank takes every `world_size`-th one.

    At `end` some ranks may have none: all have as many arrays, for they run the model together.

    It is a `DistributedSampler` in name, so that Lightning leaves it in place on several devices.
    """

    batch_size: int
    batches: int
    start: Callable[[], int] = int
    end: int | None = None
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[np.ndarray]:
        first = self.start()
        for begin in range(first, first + self.batches * self.batch_size, self.batch_size):
            stop = begin + self.batch_size if self.end is None else min(begin + self.batch_size, self.end)
            yield np.arange(begin + self.rank, stop, self.world_size)

    def __len__(self) -> int:
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the epoch follows from the position."""


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items as these come, the last maybe shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


@dataclass(eq=False)
class PredictionInputs(IterableDataset[Batch]):
    """Batches of what `predict` is to answer, as it comes: `inputs` yields it, for each pass.

    `encode` makes a batch of some, cut to `length` tokens, and says how many were cut.
    """

    inputs: Callable[[], Iterable[Any]]
    encode: Callable[[list[Any]], tuple[Batch, int]]
    batch_size: int
    length: int

    def __iter__(self) -> Iterator[Batch]:
        cut = 0
        for some in in_batches(self.inputs(), self.batch_size):
            batch, truncated = self.encode(some)
            cut += truncated
            yield batch
        if cut:
            say(f"{cut:,} inputs were longer than data.max_length ({self.length} tokens) and were cut")


def encode_lines(
    texts: list[str], tokenizer: TextTokenizer, length: int, masks: bool = True
) -> tuple[PredictBatch, int]:
    """Return texts as a padded batch [B, S <= length], and how many were cut to fit; with `masks`, [MASK] is read."""
    before, after = tokenizer.template
    room = length - len(before) - len(after)
    own = [text.replace(MASK_PLACEHOLDER, tokenizer.mask_token) if masks else text for text in texts]
    encoded = tokenizer.encode_bare(own, literal=not masks)
    rows = [before + ids[:room] + after for ids in encoded]
    batch = PredictBatch(PackedInputs.from_arrays(*pad_rows(rows, tokenizer.pad_id)), texts)
    return batch, sum(len(ids) > room for ids in encoded)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, positions and document ids (0, on padding -1) of rows padded to the longest: int64 [B, S]."""
    width = max(map(len, rows), default=1) or 1
    alone = [[np.asarray(row, dtype=np.int64)] for row in rows]
    return fill_rows(alone, width, pad_id), *number_rows(alone, width)
