from __future__ import annotations

import torch

from leanbert.data.batches.batch import MLMBatch, PredictBatch
from leanbert.models.packed_inputs import PackedInputs


def make_batch(rows: int) -> MLMBatch:
    full = torch.arange(rows * 8).reshape(rows, 8)
    return MLMBatch(PackedInputs(full, full + 1, full + 2), full[:, :2], full[:, 2:4])


def test_split_gives_views_and_a_smaller_last_piece() -> None:
    batch = make_batch(5)
    pieces = batch.split(2)
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert pieces[1].inputs.input_ids.data_ptr() == batch.inputs.input_ids[2:].data_ptr()
    assert torch.equal(pieces[2].targets, batch.targets[4:])
    assert torch.equal(pieces[0].inputs.document_ids, batch.inputs.document_ids[:2])


def test_to_moves_every_tensor() -> None:
    moved = make_batch(2).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert len(moved.tensors()) == 5


def test_predict_batch_keeps_its_texts() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    moved = PredictBatch(PackedInputs(ids, ids, ids, ids), ["a", "b"]).to("meta")
    assert len(moved) == 2
    assert moved.texts == ["a", "b"]
    assert moved.inputs.document_ids.device.type == "meta"
