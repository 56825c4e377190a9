"""Full rows: of running text the stream cut every `length` tokens, of examples as many whole ones as there is room for.

Letters: B rows, S row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leanbert.data.store.examples import ExampleCache
from leanbert.randomness import permute

PADDING_DOCUMENT = -1
"""Document id of padding."""


@dataclass(frozen=True)
class PackedRows:
    """Rows as arrays [B, S]; `ids`, `documents` and `positions` are int64.

    Documents are numbered from 0 in each row; positions count from 0 in each document's piece of the row.
    """

    ids: np.ndarray
    documents: np.ndarray
    positions: np.ndarray

    @property
    def real(self) -> np.ndarray:
        """Where there are tokens, not padding: bool [B, S]."""
        return self.documents != PADDING_DOCUMENT


def row_count(tokens: int, length: int) -> int:
    """Return how many rows of `length` hold `tokens` tokens."""
    return -(-tokens // length)


def read_rows(cache: ExampleCache, rows: np.ndarray, length: int, pad_id: int) -> PackedRows:
    """Return the rows with the numbers `rows`, int64 [B], of the column "ids" cut every `length` tokens."""
    starts = rows.astype(np.int64) * length  # [B]
    columns = np.arange(length)
    places = starts[:, None] + columns  # [B, S]
    stream = cache.values("ids")
    real = places < len(stream)
    ids = stream[np.minimum(places, len(stream) - 1)].astype(np.int64)
    begins = _document_begins(cache.offsets("ids"), starts, length)  # [B, S]
    documents = np.cumsum(begins[:, 1:], axis=1, dtype=np.int64)
    documents = np.concatenate([np.zeros((len(rows), 1), dtype=np.int64), documents], axis=1)
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    return PackedRows(
        ids=np.where(real, ids, pad_id),
        documents=np.where(real, documents, PADDING_DOCUMENT),
        positions=np.where(real, positions, 0),
    )


def _document_begins(offsets: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Mark the places of the rows where a document begins: bool [B, S]."""
    first = np.searchsorted(offsets, starts)
    counts = np.searchsorted(offsets, starts + length) - first
    row = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.zeros((len(starts), length), dtype=bool)
    begins[row, offsets[first[row] + within] - starts[row]] = True
    return begins


def fill_rows(rows: Sequence[Sequence[np.ndarray]], length: int, fill: int) -> np.ndarray:
    """Return the sequences of each row one after the other, and `fill` after the last: int64 [B, length]."""
    filled = np.full((len(rows), length), fill, dtype=np.int64)
    for row, sequences in zip(filled, rows, strict=True):
        values = np.concatenate([*sequences, row[:0]])
        row[: len(values)] = values
    return filled


def number_rows(rows: Sequence[Sequence[np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places in the sequence (0 on padding) and the sequence's number in the row: int64 [B, length]."""
    sizes = [np.asarray([len(sequence) for sequence in sequences], dtype=np.int64) for sequences in rows]
    documents = [[np.repeat(np.arange(len(size)), size)] for size in sizes]
    positions = [[np.arange(count) for count in size] for size in sizes]
    return fill_rows(positions, length, 0), fill_rows(documents, length, PADDING_DOCUMENT)


OPEN_ROWS = 256
"""Rows that are looked at for room: more waste less, and take longer."""


@dataclass(frozen=True)
class Packing:
    """Which examples share a row: row r has `order[starts[r] : starts[r + 1]]`; both are int64."""

    order: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def examples(self, row: int) -> np.ndarray:
        """Return the numbers of a row's examples."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack_examples(lengths: np.ndarray, room: tuple[int, ...], most: int, seed: int | None = None) -> Packing:
    """Put examples into rows, first fit (Johnson 1974) among the newest `OPEN_ROWS` rows.

    `lengths`, int64 [N, C], are the tokens of each example in each of the C sequences that a row has (source, target);
    `room` is what a row has in each, and no example may need more; `most` examples are in a row. The `seed` decides
    which share one; None: neighbours do.
    """
    count = len(lengths)
    numbers = np.arange(count)
    order = numbers if seed is None else permute(numbers, count, seed, count)
    free = np.empty((0, len(room)), dtype=np.int64)  # of the open rows, [open, C]
    rows: list[list[int]] = []
    for example in order.tolist():
        need = lengths[example]
        fits = np.flatnonzero((free >= need).all(axis=1))
        if len(fits):
            place = int(fits[0])
        else:
            free = np.concatenate([free[-(OPEN_ROWS - 1) :], np.asarray([room])])
            place = len(free) - 1
            rows.append([])
        row = len(rows) - len(free) + place
        rows[row].append(example)
        free[place] = free[place] - need if len(rows[row]) < most else -1
    flat = np.asarray([example for row in rows for example in row], dtype=np.int64)
    return Packing(flat, np.cumsum([0, *map(len, rows)], dtype=np.int64))
