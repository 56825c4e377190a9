"""How large prepared data are, and how much of them the tokenizer knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from leanbert.data.store.examples import ExampleCache
from leanbert.data.tokenizers.tokenizer import TextTokenizer


@dataclass(frozen=True)
class CorpusStatistics:
    """Size of prepared data; `tokens_per_row` is the mean of real tokens in a row of `max_length`.

    `unknown_share` is of the tokens that stand for text: those of the template are none.
    """

    documents: int
    tokens: int
    unknown_share: float
    rows: int
    tokens_per_row: float


def count(cache: ExampleCache, tokenizers: Mapping[str, TextTokenizer], rows: int, length: int) -> CorpusStatistics:
    """Return the statistics of columns of ids, each with its tokenizer, which fill `rows` rows of `length` tokens."""
    tokens = sum(cache.size(column) for column in tokenizers)
    counted = [count_unknown(cache.counts(column), tokenizer) for column, tokenizer in tokenizers.items()]
    unknown, text = (sum(numbers) for numbers in zip(*counted, strict=True))
    per_row = min(tokens / rows / len(tokenizers), length)
    return CorpusStatistics(cache.count, tokens, unknown / max(1, text), rows, per_row)


def count_unknown(counts: np.ndarray, tokenizer: TextTokenizer) -> tuple[int, int]:
    """Return how many tokens are unknown, and how many stand for text, by `counts` of each id, int64 [V]."""
    text = int(counts.sum() - counts[tokenizer.special_ids].sum())
    unknown = 0 if tokenizer.unk_id is None else int(counts[tokenizer.unk_id])
    return unknown, text + unknown


def knows_more(settings: Any) -> str:
    """Return what to set for a tokenizer that knows text which the one at hand does not."""
    if settings["tokenizer"] is not None:
        return "another data.tokenizer, one that knows these characters"
    return "data.tokenizer_kind bpe (byte-level, it knows all text) or unigram, or a larger data.vocab_size"
