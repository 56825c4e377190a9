from __future__ import annotations

from pathlib import Path

import numpy as np

from leanbert.data.batches.packing import read_rows, row_count
from leanbert.data.store.examples import ExampleCache


def make_cache(folder: Path, lengths: list[int]) -> ExampleCache:
    tokens = sum(lengths)
    folder.mkdir(exist_ok=True)
    np.arange(10, 10 + tokens, dtype=np.uint16).tofile(folder / "ids.bin")
    np.cumsum([0, *lengths], dtype=np.int64).tofile(folder / "ids.offsets.bin")
    return ExampleCache(folder, len(lengths), {"ids": "uint16"}, {})


def test_rows_are_cuts_of_the_stream_and_only_the_end_is_padded(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, [3, 9, 1, 1, 5])
    assert row_count(19, 8) == 3
    rows = read_rows(cache, np.array([0, 1, 2]), 8, pad_id=7)
    assert rows.ids.tolist() == [
        [10, 11, 12, 13, 14, 15, 16, 17],
        [18, 19, 20, 21, 22, 23, 24, 25],
        [26, 27, 28, 7, 7, 7, 7, 7],
    ]
    assert rows.documents.tolist() == [
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 2, 3, 3],
        [0, 0, 0, -1, -1, -1, -1, -1],
    ]
    assert rows.positions.tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 0, 0, 0, 1],
        [0, 1, 2, 0, 0, 0, 0, 0],
    ]
    assert rows.real.sum() == 19


def test_rows_come_in_any_order_and_equal_those_read_alone(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, np.random.default_rng(0).integers(1, 40, 200).tolist())
    order = np.array([17, 3, 3, 200, 0])
    rows = read_rows(cache, order, 16, 0)
    for place, row in enumerate(order):
        alone = read_rows(cache, np.array([row]), 16, 0)
        assert np.array_equal(alone.ids[0], rows.ids[place])
        assert np.array_equal(alone.documents[0], rows.documents[place])
        assert np.array_equal(alone.positions[0], rows.positions[place])


def test_a_document_may_begin_with_a_row_and_end_with_one(tmp_path: Path) -> None:
    rows = read_rows(make_cache(tmp_path, [8, 8]), np.array([0, 1]), 8, 0)
    assert rows.documents.tolist() == [[0] * 8, [0] * 8]
    assert rows.positions.tolist() == [list(range(8))] * 2
