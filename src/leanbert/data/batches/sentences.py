"""Sentences of words as ids, their predicate marked, with the place of each word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from leanbert.data.batches.batch import IGNORED, WordBatch
from leanbert.data.batches.labelled import Encoded, pad_encoded
from leanbert.data.batches.loading import pad_rows
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import Mark


class Sentence(NamedTuple):
    """Words and the place of their predicate; None: there is none, or it is to be found."""

    tokens: list[str]
    predicate: int | None = None


def encode_sentences(
    sentences: Sequence[Sentence], tokenizer: TextTokenizer, length: int, mark: Mark = "tokens"
) -> list[Encoded]:
    """Encode sentences word by word; of one that needs more than `length` tokens the last words are left out.

    The places are those of the words' first pieces.
    """
    pieces = iter(tokenizer.encode_words([word for sentence in sentences for word in sentence.tokens]))
    return [
        _encode(sentence, [next(pieces) for _ in sentence.tokens], tokenizer, length, mark) for sentence in sentences
    ]


def _encode(sentence: Sentence, pieces: list[list[int]], tokenizer: TextTokenizer, length: int, mark: Mark) -> Encoded:
    before, after = tokenizer.template
    separator = [tokenizer.separator_id] if mark == "tokens" and sentence.predicate is not None else []
    needed = len(before) + sum(map(len, pieces)) + 2 * len(separator) + len(after)
    ids, segments, index = list(before), [0] * len(before), []
    for number, piece in enumerate(pieces):
        is_predicate = number == sentence.predicate
        added = [*separator, *piece, *separator] if is_predicate else piece
        if len(ids) + len(added) + len(after) > length:
            break
        index.append(len(ids) + (len(separator) if is_predicate else 0))
        ids += added
        segments += [int(is_predicate and mark == "segments")] * len(added)
    return Encoded([*ids, *after], [*segments, *[0] * len(after)], index, needed)


def word_batch(sentences: Sequence[Sentence], tokenizer: TextTokenizer, length: int, mark: Mark) -> WordBatch:
    """Return sentences, one a row, as a padded batch; words that do not fit into `length` have no target."""
    encoded = encode_sentences(sentences, tokenizer, length, mark)
    rows = pad_encoded(encoded, tokenizer.pad_id)
    index, _, real = pad_rows([one.places for one in encoded], 0)
    targets = np.where(real == 0, 0, IGNORED)
    return WordBatch(
        PackedInputs.from_arrays(*rows), list(sentences), torch.from_numpy(index), torch.from_numpy(targets)
    )
