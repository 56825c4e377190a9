"""Dynamic masking: which tokens of a batch to predict, and what stands in their place (BERT, 2018).

Every choice is a hash of (seed, epoch, row, column), so that a resumed run masks as an undisturbed one would.
Letters: B rows, S row length, M targets per row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leanbert.data.batches.batch import IGNORED
from leanbert.data.batches.packing import PackedRows
from leanbert.randomness import mix, uniform

_NEVER = np.uint64(2**64 - 1)
_CHOICE, _FATE, _REPLACEMENT, _COUNT = 1, 2, 3, 4  # separate streams of random numbers


@dataclass(frozen=True)
class MaskingRule:
    """How to mask.

    `rate` is the fraction of a row's tokens to predict, `split` what fraction of them becomes the mask token, a
    random token of the whole vocabulary, and stays; `special` is bool [V], the tokens never chosen;
    `continues`, bool [V] or None, says which tokens continue a word: with it words are chosen whole.
    """

    rate: float
    split: tuple[float, float, float]
    mask_id: int
    special: np.ndarray
    continues: np.ndarray | None = None


def target_slots(rate: float, length: int) -> int:
    """Return M, the targets of a full row of `length` tokens of which a fraction of `rate` is masked."""
    return max(1, round(rate * length))


@dataclass(frozen=True)
class MaskedRows:
    """Masked `ids` int64 [B, S]; places to predict `index` int64 [B, M], ascending; `targets` int64 [B, M].

    A row with fewer places than M (padding, few eligible tokens) has -100 in `targets` of the last slots.
    """

    ids: np.ndarray
    index: np.ndarray
    targets: np.ndarray


def mask_rows(rows: PackedRows, key: np.ndarray, rule: MaskingRule) -> MaskedRows:
    """Choose targets and hide them; `key`, uint64 [B], holds what each row's choice depends on.

    A full row has exactly M targets while it has as many eligible tokens; a row with padding has the same
    rate of its tokens. Words chosen whole fill M exactly where there are words of one token to fill it with.
    """
    length = rows.ids.shape[1]
    slots = target_slots(rule.rate, length)
    quota = np.minimum(slots, np.round(rule.rate * rows.real.sum(axis=1)).astype(np.int64))  # [B]
    eligible = rows.real & ~rule.special[rows.ids]  # [B, S]
    if rule.continues is None:
        chosen = _first_places(eligible, key, quota, slots)
    else:
        chosen = _whole_words(eligible, _word_starts(rows, eligible, rule.continues), key, quota, slots)
    index = np.sort(chosen, axis=1)  # [B, M]; unused slots hold S
    used = index < length
    index = np.minimum(index, length - 1)
    originals = np.take_along_axis(rows.ids, index, axis=1)
    hidden = np.where(used, _disguise(originals, key, index, rule), originals)
    ids = rows.ids.copy()
    # An unused slot points at the last column, which may be a target itself: write the used ones only.
    row, slot = np.nonzero(used)
    ids[row, index[row, slot]] = hidden[row, slot]
    return MaskedRows(ids, index, np.where(used, originals, IGNORED))


def _word_starts(rows: PackedRows, eligible: np.ndarray, continues: np.ndarray) -> np.ndarray:
    """Return the column at which each token's word begins, int64 [B, S]."""
    columns = np.arange(rows.ids.shape[1])
    inner = continues[rows.ids] & eligible
    inner[:, 0] = False
    inner[:, 1:] &= eligible[:, :-1] & (rows.documents[:, 1:] == rows.documents[:, :-1])
    return np.maximum.accumulate(np.where(inner, 0, columns), axis=1)


def _first_places(eligible: np.ndarray, key: np.ndarray, quota: np.ndarray, slots: int) -> np.ndarray:
    """Return the first eligible places in a random order, int64 [B, M], S where a slot stays unused."""
    length = eligible.shape[1]
    priority = np.where(eligible, mix(key[:, None], _CHOICE, np.arange(length)), _NEVER)
    order = np.argsort(priority, axis=1)[:, :slots]
    possible = np.take_along_axis(priority, order, axis=1) != _NEVER
    return np.where(possible & (np.arange(order.shape[1]) < quota[:, None]), order, length)


def _whole_words(
    eligible: np.ndarray, starts: np.ndarray, key: np.ndarray, quota: np.ndarray, slots: int
) -> np.ndarray:
    """Like `_first_places`, whole words only, each with the same probability however many tokens it has.

    Of the words of one length the first in a random order are taken: as many as make the quota's share of their tokens,
    rounded up or down at random. What rounding has added or left is made up for by the shorter words, and words of one
    token fill the quota exactly. Where there are none some slots may stay unused.
    """
    rows, length = eligible.shape
    line = np.arange(rows)[:, None]
    words = line * length + starts
    size = np.where(eligible, np.bincount(words.ravel(), eligible.ravel(), rows * length)[words], 0).astype(np.int64)
    longest = int(size.max())
    tokens = np.bincount((line * (longest + 1) + size).ravel(), minlength=rows * (longest + 1)).reshape(rows, -1)
    tokens[:, 0] = 0  # not eligible
    taken = _tokens_by_size(tokens, key, quota)
    hashes = mix(key[:, None], _CHOICE, starts) >> np.uint64(16)
    order = np.argsort(np.where(eligible, size.astype(np.uint64) << np.uint64(48) | hashes, _NEVER), axis=1)
    size = np.take_along_axis(size, order, axis=1)
    place = np.arange(length) - np.take_along_axis(tokens.cumsum(axis=1) - tokens, size, axis=1)  # among its size
    chosen = place < np.take_along_axis(taken, size, axis=1)
    return np.sort(np.where(chosen, order, length), axis=1)[:, :slots]


def _tokens_by_size(tokens: np.ndarray, key: np.ndarray, quota: np.ndarray) -> np.ndarray:
    """Return how many of the `tokens` in words of each size are chosen, int64 [B, longest + 1] both."""
    taken, room = np.zeros_like(tokens), quota.copy()
    fraction = quota / np.maximum(tokens.sum(axis=1), 1)
    owed = np.zeros(len(tokens))
    for size in np.flatnonzero(tokens.any(axis=0))[::-1]:
        owed += fraction * tokens[:, size]
        number = room if size == 1 else np.floor(owed / size + uniform(mix(key, _COUNT, size))).astype(np.int64)
        number = np.clip(number, 0, np.minimum(tokens[:, size], room) // size)
        taken[:, size] = number * size
        owed -= taken[:, size]
        room -= taken[:, size]
    return taken


def _disguise(originals: np.ndarray, key: np.ndarray, index: np.ndarray, rule: MaskingRule) -> np.ndarray:
    """Return what the model sees in place of the targets: int64 [B, M]."""
    fate = uniform(mix(key[:, None], _FATE, index))
    replacement = mix(key[:, None], _REPLACEMENT, index) % np.uint64(len(rule.special))
    masked, replaced, _ = rule.split
    visible = np.where(fate < masked + replaced, replacement.astype(np.int64), originals)
    return np.where(fate < masked, rule.mask_id, visible)
