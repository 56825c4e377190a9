"""Full rows: the stream of documents cut every `length` tokens, nothing dropped and nothing padded but the end.

Letters: B rows, S row length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leanbert.data.cache import TokenCache

PADDING_DOCUMENT = -1
"""Document id of padding, of which there is some in the last row only."""


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


def read_rows(cache: TokenCache, rows: np.ndarray, length: int, pad_id: int) -> PackedRows:
    """Return the rows with the numbers `rows`, int64 [B], of the cache cut every `length` tokens."""
    starts = rows.astype(np.int64) * length  # [B]
    columns = np.arange(length)
    places = starts[:, None] + columns  # [B, S]
    real = places < cache.tokens
    ids = cache.ids()[np.minimum(places, cache.tokens - 1)].astype(np.int64)
    begins = _document_begins(cache.offsets(), starts, length)  # [B, S]
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
