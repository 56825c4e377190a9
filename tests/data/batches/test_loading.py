from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from leanbert.data.batches.loading import PositionSampler, PredictionInputs, Rows, encode_lines
from leanbert.data.batches.packing import row_count
from leanbert.data.mlm import masked_batch
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from tests.data.batches.test_masking import make_rule
from tests.data.batches.test_packing import make_cache
from tests.data.corpora import ENGLISH, sentences


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    cache = make_cache(tmp_path / "tokens", [7, 30, 61, 2, 60] * 5)
    return Rows(row_count(cache.size("ids"), 16), partial(masked_batch, cache, 16, 0, make_rule()), seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    documents = sentences(ENGLISH, 200)
    return TextTokenizer.train(lambda: documents, vocab_size=300)


def test_every_epoch_visits_every_row_once_in_another_order(rows: Rows) -> None:
    assert rows.rows == 50
    stored = Rows(rows.rows, rows.make)
    expected = sorted(unmasked(stored, np.arange(50)))
    first, second = unmasked(rows, np.arange(50)), unmasked(rows, np.arange(50, 100))
    assert sorted(first) == sorted(second) == expected
    assert first != second


def unmasked(rows: Rows, positions: np.ndarray) -> list[tuple[int, ...]]:
    batch = rows[positions]
    ids = batch.inputs.input_ids.clone()
    for row, index, targets in zip(ids, batch.target_index, batch.targets, strict=True):
        row[index[targets != -100]] = targets[targets != -100]
    return [tuple(row) for row in ids.tolist()]


def test_a_batch_may_straddle_epochs_and_equals_its_rows_alone(rows: Rows) -> None:
    positions = np.arange(45, 55)
    batch = rows[positions]
    for place, position in enumerate(positions):
        alone = rows[np.array([position])]
        for name, tensor in batch.tensors().items():
            assert torch.equal(tensor[place], alone.tensors()[name][0]), name


def test_masks_change_with_the_epoch_in_training_only(rows: Rows) -> None:
    def chosen(position: int) -> list[int]:
        return rows[np.array([position])].target_index[0].tolist()

    row = unmasked(rows, np.array([0]))[0]
    again = next(p for p in range(50, 100) if unmasked(rows, np.array([p]))[0] == row)
    assert chosen(0) != chosen(again)
    fixed = Rows(rows.rows, rows.make)
    assert torch.equal(fixed[np.arange(4)].inputs.input_ids[2:], fixed[np.array([2, 3])].inputs.input_ids)


def test_evaluation_masks_are_fixed_for_ever(rows: Rows) -> None:
    batch = Rows(rows.rows, rows.make)[np.arange(3)]
    assert batch.target_index.tolist() == [[14, 15], [3, 11], [0, 12]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_each_batch(world_size: int) -> None:
    whole = [positions.tolist() for positions in PositionSampler(8, 3, start=lambda: 5)]
    ranks = [
        [p.tolist() for p in PositionSampler(8, 3, start=lambda: 5, rank=rank, world_size=world_size)]
        for rank in range(world_size)
    ]
    assert whole == [list(range(5, 13)), list(range(13, 21)), list(range(21, 29))]
    assert [sorted(chain(*parts)) for parts in zip(*ranks, strict=True)] == whole
    assert {len(part) for rank in ranks for part in rank} == {8 // world_size}


def test_the_last_evaluation_batch_is_smaller() -> None:
    assert [len(positions) for positions in PositionSampler(8, 3, end=20)] == [8, 8, 4]


def test_ranks_have_as_many_evaluation_batches_though_some_have_no_row(rows: Rows) -> None:
    ranks = [[p.tolist() for p in PositionSampler(8, 2, end=10, rank=rank, world_size=4)] for rank in range(4)]
    assert ranks == [[[0, 4], [8]], [[1, 5], [9]], [[2, 6], []], [[3, 7], []]]
    held = Rows(rows.rows, rows.make)
    held.blank = rows[np.arange(1)]
    assert held[np.arange(0)] is held.blank


def test_lines_become_padded_rows(tokenizer: TextTokenizer) -> None:
    texts = ["the [MASK] runs", "", "the river runs past mill and market until it meets"]
    batch, cut = encode_lines(texts, tokenizer, 8)
    assert cut == 1
    assert batch.texts == texts
    assert batch.inputs.input_ids.shape == (3, 8)
    assert batch.inputs.input_ids[0].tolist() == [2, *tokenizer.encode_batch([texts[0]])[0][1:4], 3, 0, 0, 0]
    assert batch.inputs.input_ids[1, :3].tolist() == [2, 3, 0]
    assert (batch.inputs.input_ids[2, 0], batch.inputs.input_ids[2, 7]) == (2, 3)
    assert batch.inputs.document_ids[1].tolist() == [0, 0, *[-1] * 6]
    assert batch.inputs.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_prediction_batches_come_in_order_and_cuts_are_counted(
    tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"the [MASK] runs {'past ' * n}" for n in range(5)]
    inputs = PredictionInputs(lambda: iter(texts), lambda some: encode_lines(some, tokenizer, 8), 2, 8)
    for _ in range(2):  # passes
        batches = list(inputs)
        assert [batch.texts for batch in batches] == [texts[:2], texts[2:4], texts[4:]]
        assert capsys.readouterr().err == "1 inputs were longer than data.max_length (8 tokens) and were cut\n"


def test_a_batch_is_made_of_the_first_inputs_before_there_are_more(tokenizer: TextTokenizer) -> None:
    taken: list[str] = []

    def texts() -> Iterator[str]:
        for text in "abcd":
            taken.append(text)
            yield text

    batches = iter(PredictionInputs(texts, lambda some: encode_lines(some, tokenizer, 8), 2, 8))
    assert next(batches).texts == taken == ["a", "b"]
