from __future__ import annotations

import time

import numpy as np
import pytest

from leanbert.data.batches.masking import MaskingRule, mask_rows
from leanbert.data.batches.packing import PackedRows
from leanbert.randomness import mix

V = 1000
MASK = 4


def make_rows(batch: int = 64) -> PackedRows:
    ids = 5 + (np.arange(batch * 128, dtype=np.int64) * 7919 % (V - 5)).reshape(batch, 128)
    ids[:, 0], ids[:, 50], ids[:, 51] = 2, 3, 2
    documents = np.zeros_like(ids)
    documents[:, 51:] = 1
    return PackedRows(ids, documents, np.broadcast_to(np.arange(128), ids.shape))


def make_rule(rate: float = 0.15, continues: np.ndarray | None = None) -> MaskingRule:
    special = np.zeros(V, dtype=bool)
    special[:5] = True
    return MaskingRule(rate, (0.8, 0.1, 0.1), MASK, special, continues)


def keys(rows: PackedRows, seed: int = 0) -> np.ndarray:
    return mix(seed, 0, np.arange(len(rows.ids)))


@pytest.mark.parametrize(("rate", "slots"), [(0.15, 19), (0.2, 26), (0.4, 51), (0.001, 1)])
def test_a_full_row_has_exactly_its_targets(rate: float, slots: int) -> None:
    rows = make_rows()
    masked = mask_rows(rows, keys(rows), make_rule(max(rate, 1 / 128)))
    assert masked.index.shape == (64, slots)
    assert (masked.targets != -100).all()
    assert (np.diff(masked.index, axis=1) > 0).all()
    assert np.array_equal(masked.targets, np.take_along_axis(rows.ids, masked.index, axis=1))


def test_only_targets_change_and_special_tokens_are_never_chosen() -> None:
    rows = make_rows(512)
    masked = mask_rows(rows, keys(rows), make_rule(0.9))
    assert (masked.targets[masked.targets != -100] >= 5).all()
    is_target = np.zeros(rows.ids.shape, dtype=bool)
    np.put_along_axis(is_target, masked.index, True, axis=1)
    assert np.array_equal(masked.ids[~is_target], rows.ids[~is_target])


def test_shares_of_mask_random_and_kept() -> None:
    rows = make_rows(2000)
    masked = mask_rows(rows, keys(rows), make_rule(0.2))
    seen = np.take_along_axis(masked.ids, masked.index, axis=1)
    is_mask = seen == MASK
    is_kept = seen == masked.targets
    others = seen[~is_mask & ~is_kept]
    assert masked.index.size == 52_000
    assert is_mask.mean() == pytest.approx(0.8, abs=0.006)
    assert is_kept.mean() == pytest.approx(0.1, abs=0.004)
    assert {0, 1, 2, 3} <= set(others.tolist())
    assert len(np.unique(others)) > 0.98 * V
    counts = np.bincount(masked.index.ravel(), minlength=128)
    assert counts[[0, 50, 51]].tolist() == [0, 0, 0]
    assert np.delete(counts, [0, 50, 51]).std() < 30  # binomial: 20


def test_masks_follow_from_the_row_key_alone() -> None:
    rows = make_rows(8)
    whole = mask_rows(rows, keys(rows), make_rule())
    part = PackedRows(rows.ids[3:5], rows.documents[3:5], rows.positions[3:5])
    alone = mask_rows(part, keys(rows)[3:5], make_rule())
    assert np.array_equal(whole.ids[3:5], alone.ids)
    other = mask_rows(rows, keys(rows, seed=1), make_rule())
    assert not np.array_equal(whole.index, other.index)


def test_unused_slots_where_too_few_are_eligible() -> None:
    rows = make_rows(2)
    rows.ids[0, 3:] = 2
    masked = mask_rows(rows, keys(rows), make_rule())
    assert sorted(masked.index[0, :2].tolist()) == [1, 2]
    assert (masked.targets[0] != -100).sum() == 2
    assert (masked.targets[0, 2:] == -100).all()
    assert (masked.targets[1] != -100).sum() == 19
    assert np.array_equal(masked.ids[0, 3:], rows.ids[0, 3:])


def test_a_padded_row_has_the_same_rate_and_no_target_on_padding() -> None:
    rows = make_rows(1)
    rows.documents[0, 40:] = -1
    masked = mask_rows(rows, keys(rows), make_rule(0.2))
    used = masked.targets[0] != -100
    assert used.sum() == 8
    assert masked.index[0, used].max() < 40


def test_a_target_in_the_last_column_survives_unused_slots() -> None:
    full = make_rows()
    rows = PackedRows(full.ids[:, :16].copy(), full.documents[:, :16], full.positions[:, :16])
    rows.ids[:, :15] = 2
    masked = mask_rows(rows, keys(rows), make_rule(0.2))
    assert (masked.index[:, 0] == 15).all()
    assert ((masked.targets != -100).sum(axis=1) == 1).all()
    assert (masked.ids[:, 15] == MASK).mean() > 0.6


def word_ids(rows: PackedRows, continues: np.ndarray) -> np.ndarray:
    starts = ~continues[rows.ids]
    return np.cumsum(starts, axis=1)


@pytest.mark.parametrize("share", [0.1, 0.45])
def test_whole_words_are_masked_whole_or_not_at_all(share: float) -> None:
    rows = make_rows(256)
    continues = mix(1, np.arange(V)) < np.uint64(share * 2**64)
    continues[:5] = False
    masked = mask_rows(rows, keys(rows), make_rule(0.2, continues))
    is_target = np.zeros(rows.ids.shape, dtype=bool)
    row, slot = np.nonzero(masked.targets != -100)
    is_target[row, masked.index[row, slot]] = True
    words = word_ids(rows, continues)
    for r in range(256):
        # After a special token a continuing token begins a piece of its own, as its head is not eligible.
        for word in np.unique(words[r][is_target[r]]):
            members = (words[r] == word) & (rows.ids[r] >= 5)
            assert is_target[r][members].all()
    assert (masked.targets != -100).all()


@pytest.mark.parametrize(("length", "shares"), [(128, (0.7, 0.2, 0.07, 0.03)), (64, (0.4, 0.3, 0.2, 0.1))])
def test_words_of_any_number_of_pieces_are_masked_at_the_rate(length: int, shares: tuple[float, ...]) -> None:
    chance, count = np.random.default_rng(0), 6000
    pieces = chance.choice([1, 2, 4, 8], (count, length), p=shares)
    ends = pieces.cumsum(axis=1)
    words = (np.arange(length) >= ends[:, :, None]).sum(axis=1)  # [B, S]: number of each token's word
    size = np.take_along_axis(pieces, words, axis=1)
    begins = np.diff(words, axis=1, prepend=-1) > 0
    whole = begins & (np.take_along_axis(ends, words, axis=1) <= length)
    continues = np.arange(V) >= 500
    ids = np.where(begins, chance.integers(5, 500, words.shape), chance.integers(500, V, words.shape))
    rows = PackedRows(ids, np.zeros_like(ids), np.broadcast_to(np.arange(length), ids.shape))
    masked = mask_rows(rows, keys(rows), make_rule(0.25, continues))
    is_target = np.zeros(ids.shape, dtype=bool)
    row, slot = np.nonzero(masked.targets != -100)
    is_target[row, masked.index[row, slot]] = True
    assert (masked.targets != -100).mean() > 0.999
    for number in (1, 2, 4, 8):
        assert is_target[whole & (size == number)].mean() == pytest.approx(0.25, abs=0.015), number


def test_words_that_cannot_fill_the_quota_leave_slots() -> None:
    ids = np.where(np.arange(128) % 8 == 0, 5, 500)[None].repeat(4000, axis=0)
    rows = PackedRows(ids, np.zeros_like(ids), np.broadcast_to(np.arange(128), ids.shape))
    masked = mask_rows(rows, keys(rows), make_rule(0.2, np.arange(V) >= 500))
    assert ((masked.targets != -100).sum(axis=1) == 24).all()  # three of sixteen words, where 26 were asked for
    counts = np.bincount(masked.index[:, :24].ravel() // 8, minlength=16) / 8
    assert counts.sum() == 12_000
    assert counts.std() < 50  # binomial: 25


def test_a_batch_takes_less_than_two_milliseconds() -> None:
    rows = make_rows(32)
    continues = np.arange(V) % 3 == 0
    for rule in (make_rule(), make_rule(0.2, continues)):
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            mask_rows(rows, keys(rows), rule)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.002
