from __future__ import annotations

from dataclasses import replace

import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from leanbert.data.batches.batch import MLMBatch, PredictBatch
from leanbert.data.batches.labelled import LabelledCollator
from leanbert.data.batches.pairs import PairCollator
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


def test_the_host_waits_for_no_copy_to_cuda(monkeypatch) -> None:
    asked = set()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: asked.add((str(device), non_blocking)))
    for device in ("cpu", "cuda", torch.device("cuda:1")):
        make_batch(2).to(device)
    assert asked == {("cpu", False), ("cuda", True), ("cuda:1", True)}


def test_predict_batch_keeps_its_texts() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    moved = PredictBatch(PackedInputs(ids, ids, ids, ids), ["a", "b"]).to("meta")
    assert len(moved) == 2
    assert moved.texts == ["a", "b"]
    assert moved.inputs.document_ids.device.type == "meta"


def test_tensors_have_names_and_pieces() -> None:
    batch = PairCollator((8, 4), (0, 0)).blank(3)
    inputs = ("input_ids", "position_ids", "document_ids")
    assert {name: tuple(tensor.shape) for name, tensor in batch.tensors().items()} == {
        **dict.fromkeys(inputs, (3, 8)), **{f"decoder_{name}": (3, 4) for name in inputs}, "targets": (3, 4),
    }  # fmt: skip
    assert (len(batch), batch.tokens) == (3, 3 * 8 + 3 * 4)
    assert [piece.decoder_inputs.input_ids.shape for piece in batch.split(2)] == [(2, 4), (1, 4)]


def test_lists_are_split_too_and_may_be_empty() -> None:
    batch = LabelledCollator(8, 2, 0, "single", 5).blank(3)
    assert [piece.cut for piece in batch.split(2)] == [[], []]
    pieces = replace(batch, cut=[[[1]], [[2]], []]).split(2)
    assert [piece.cut for piece in pieces] == [[[[1]], [[2]]], [[]]]


def test_lightning_converts_a_batch_to_16_bits() -> None:
    batch = HalfPrecision("bf16-true").convert_input(LabelledCollator(8, 2, 0, "regression", 5).blank(3))
    assert (batch.targets.dtype, batch.inputs.input_ids.dtype) == (torch.bfloat16, torch.int64)
