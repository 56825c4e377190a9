"""How large prepared data are, and how much of them the tokenizer knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from leanbert.data.tokenizers.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from leanbert.data.module import RowData
    from leanbert.data.settings import Part


@dataclass(frozen=True)
class CorpusStatistics:
    """Size of prepared data; `tokens_per_row` is the mean of real tokens in a row of `max_length`.

    `unknown_fraction` is of the tokens that stand for text, not of the template's.
    """

    documents: int
    tokens: int
    unknown_fraction: float
    rows: int
    tokens_per_row: float


def count(data: RowData, part: Part) -> CorpusStatistics:
    """Return the statistics of a part."""
    cache, rows = data.cache(part), data.number_of_rows(part)
    tokens = sum(cache.size(column) for column in data.columns)
    counted = [count_unknown(cache.counts(column), tokenizer) for column, tokenizer in data.columns.items()]
    unknown, text = (sum(numbers) for numbers in zip(*counted, strict=True))
    per_row = min(tokens / rows / len(data.columns), data.hparams["max_length"])
    return CorpusStatistics(cache.count, tokens, unknown / max(1, text), rows, per_row)


def count_unknown(counts: np.ndarray, tokenizer: TextTokenizer) -> tuple[int, int]:
    """Return how many tokens are unknown, and how many stand for text, by `counts` of each id, int64 [V]."""
    text = int(counts.sum() - counts[tokenizer.special_ids].sum())
    unknown = 0 if tokenizer.unk_id is None else int(counts[tokenizer.unk_id])
    return unknown, text + unknown


def knows_more(settings: Mapping[str, object]) -> str:
    """Return what to set for a tokenizer that knows text which the one at hand does not."""
    if settings["tokenizer"] is not None:
        return "another data.tokenizer, one that knows these characters"
    return "data.tokenizer_kind bpe (byte-level, it knows all text) or unigram, or a larger data.vocab_size"
