"""Dynamic masking: which tokens of a batch to predict, and what stands in their place (BERT, 2018).

Every choice is a hash of (seed, epoch, row, column), so that a resumed run masks as an undisturbed one would.
Letters: B rows, S row length, M targets per row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leanbert.data.packing import PackedRows
from leanbert.data.randomness import mix, uniform

UNUSED_TARGET = -100
_NEVER = np.uint64(2**64 - 1)
_CHOICE, _FATE, _REPLACEMENT = 1, 2, 3  # separate streams of random numbers


@dataclass(frozen=True)
class MaskingRule:
    """How to mask.

    `rate` is the share of a row's tokens to predict, `split` what share of them becomes the mask token, a
    random token of the whole vocabulary, and stays; `special` is bool [V], the tokens never chosen;
    `continues`, bool [V] or None, says which tokens continue a word: with it words are chosen whole.
    """

    rate: float
    split: tuple[float, float, float]
    mask_id: int
    special: np.ndarray
    continues: np.ndarray | None = None

    def slots(self, length: int) -> int:
        """Return M, the targets of a full row."""
        return target_slots(self.rate, length)


def target_slots(rate: float, length: int) -> int:
    """Return M, the targets of a full row of `length` tokens of which a share of `rate` is masked."""
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
    rate of its tokens. Words chosen whole that do not fit into what is left of M are passed over.
    """
    length = rows.ids.shape[1]
    slots = rule.slots(length)
    quota = np.minimum(slots, np.round(rule.rate * rows.real.sum(axis=1)).astype(np.int64))  # [B]
    priority = _priority(rows, key, rule)  # [B, S]
    choose = _first_places if rule.continues is None else _first_words
    chosen = choose(priority, quota, slots)
    index = np.sort(chosen, axis=1)  # [B, M]; unused slots hold S
    used = index < length
    index = np.minimum(index, length - 1)
    originals = np.take_along_axis(rows.ids, index, axis=1)
    hidden = np.where(used, _disguise(originals, key, index, rule), originals)
    ids = rows.ids.copy()
    # An unused slot points at the last column, which may be a target itself: write the used ones only.
    row, slot = np.nonzero(used)
    ids[row, index[row, slot]] = hidden[row, slot]
    return MaskedRows(ids, index, np.where(used, originals, UNUSED_TARGET))


def _priority(rows: PackedRows, key: np.ndarray, rule: MaskingRule) -> np.ndarray:
    """Return uint64 [B, S]: low goes first; a word's tokens share the hash of its first column."""
    columns = np.arange(rows.ids.shape[1])
    eligible = rows.real & ~rule.special[rows.ids]
    words = columns[None, :] if rule.continues is None else _word_starts(rows, eligible, rule.continues)
    return np.where(eligible, mix(key[:, None], _CHOICE, words), _NEVER)


def _word_starts(rows: PackedRows, eligible: np.ndarray, continues: np.ndarray) -> np.ndarray:
    columns = np.arange(rows.ids.shape[1])
    inner = continues[rows.ids] & eligible
    inner[:, 0] = False
    inner[:, 1:] &= eligible[:, :-1] & (rows.documents[:, 1:] == rows.documents[:, :-1])
    return np.maximum.accumulate(np.where(inner, 0, columns), axis=1)


def _first_places(priority: np.ndarray, quota: np.ndarray, slots: int) -> np.ndarray:
    """Return the places with the lowest priority values, int64 [B, M], S where a slot stays unused."""
    length = priority.shape[1]
    order = np.argpartition(priority, slots - 1, axis=1)[:, :slots] if slots < length else _all_places(priority)
    order = np.take_along_axis(order, np.argsort(np.take_along_axis(priority, order, axis=1), axis=1), axis=1)
    possible = np.take_along_axis(priority, order, axis=1) != _NEVER
    return np.where(possible & (np.arange(order.shape[1]) < quota[:, None]), order, length)


def _first_words(priority: np.ndarray, quota: np.ndarray, slots: int) -> np.ndarray:
    """Like `_first_places`, whole words only: those that fit in order, then single-token words."""
    order = np.argsort(priority, axis=1, kind="stable")  # [B, S]; a word's tokens share a value: neighbours
    value = np.take_along_axis(priority, order, axis=1)
    last = np.ones(value.shape, dtype=bool)
    last[:, :-1] = value[:, 1:] != value[:, :-1]
    first = np.ones(value.shape, dtype=bool)
    first[:, 1:] = last[:, :-1]
    rank = np.arange(value.shape[1])
    # Rank of the last token of each token's word: the word fits if that is below the quota.
    word_end = np.minimum.accumulate(np.where(last, rank, rank[-1])[:, ::-1], axis=1)[:, ::-1]
    fits = (word_end < quota[:, None]) & (value != _NEVER)
    filler = first & last & ~fits & (value != _NEVER)
    room = quota - fits.sum(axis=1)
    fits |= filler & (np.cumsum(filler, axis=1) <= room[:, None])
    places = np.where(fits, order, value.shape[1])
    return np.sort(places, axis=1)[:, :slots]


def _all_places(priority: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(priority.shape[1]), priority.shape)


def _disguise(originals: np.ndarray, key: np.ndarray, index: np.ndarray, rule: MaskingRule) -> np.ndarray:
    """Return what the model sees in place of the targets: int64 [B, M]."""
    fate = uniform(mix(key[:, None], _FATE, index))
    replacement = mix(key[:, None], _REPLACEMENT, index) % np.uint64(len(rule.special))
    masked, replaced, _ = rule.split
    visible = np.where(fate < masked + replaced, replacement.astype(np.int64), originals)
    return np.where(fate < masked, rule.mask_id, visible)
