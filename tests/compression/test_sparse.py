"""Bytes by hand, and outputs that are those of the dense layers."""

import copy

import pytest
import torch
from torch import nn

from leanbert.compression import sparse
from leanbert.compression.sparse import SparseLinear, block_size, make_sparse, sparse_bytes
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs
from tests.compression.onnx.models import pruned


def held_bytes(module):
    """Bytes of the storages that a module keeps alive, each once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def layer_of(zeros, bias=True, size=1):
    """A layer of 40 x 24 in which this share of blocks is zero."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias)
    count = 960 // size**2
    blocks = torch.ones(count)
    blocks[torch.randperm(count)[: round(zeros * count)]] = 0.0
    with torch.no_grad():
        mask = blocks.view(24 // size, -1).repeat_interleave(size, 0).repeat_interleave(size, 1)
        layer.weight.abs_().add_(0.1).mul_(mask)
    return layer


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_holds_values_columns_and_row_starts(zeros, bias):
    layer = layer_of(zeros, bias)
    held = SparseLinear(layer)
    expected = round((1 - zeros) * 960) * 8 + 25 * 4
    assert sparse_bytes(layer.weight) == expected
    assert held_bytes(held) == expected + (24 * 4 if bias else 0)
    x = torch.randn(10, 13, 40)  # more rows than are multiplied at a time
    for rows in (x, x[0], x[:, ::3], x[:, :1], x.transpose(0, 1)):
        with torch.inference_mode():
            expected, found = layer(rows), held(rows)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert held(x[:0]).shape == (0, 13, 24)


@pytest.mark.parametrize("zeros", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("size", [4, 8])
def test_a_layer_of_blocks_holds_a_column_for_each(size, zeros):
    """It takes less than dense weights with fewer than half of them zero."""
    layer = layer_of(zeros, size=size)
    count = round((1 - zeros) * 960 / size**2)
    expected = count * (4 * size**2 + 4) + (24 // size + 1) * 4
    assert sparse_bytes(layer.weight, size) == expected < layer.weight.nbytes
    assert block_size(layer.weight) == (size if zeros < 1.0 else 8)  # of nothing there are fewest row starts
    held = SparseLinear(layer, size)
    assert held_bytes(held) == expected + 24 * 4
    x = torch.randn(10, 13, 40)
    for rows in (x, x[0], x[:, ::3], x[:, :1], x.transpose(0, 1), x[:0]):
        with torch.inference_mode():
            dense, found = layer(rows), copy.deepcopy(held)(rows)
        assert found.shape == dense.shape
        assert torch.allclose(found, dense, rtol=0.0, atol=1e-5)


def test_blocks_are_those_that_take_the_fewest_bytes_and_can_be_multiplied(monkeypatch):
    assert block_size(layer_of(0.8).weight) == 1
    assert block_size(layer_of(0.8, size=8).weight[:20]) == 4  # 20 rows are no eights
    assert block_size(layer_of(0.8, size=8).weight[:21]) == 1
    monkeypatch.setattr(sparse, "_multiplies_blocks", lambda: False)
    assert block_size(layer_of(0.8, size=8).weight) == 1
    layer = layer_of(0.8, size=8)
    assert make_sparse(model := nn.Sequential(layer)) == 1
    assert model[0].values.shape == (192,)
    monkeypatch.undo()
    assert make_sparse(model := nn.Sequential(layer)) == 1
    assert model[0].values.shape == (3, 8, 8)


def test_layers_that_would_grow_stay_dense():
    """With 480 of 960 weights left both take 3,840 bytes but for the row starts, with 467 sparse takes 4 less."""
    model = nn.ModuleList([layer_of(0.5), layer_of(493 / 960)])
    assert [sparse_bytes(layer.weight) for layer in model] == [3940, 3836]
    assert make_sparse(model) == 1
    assert [type(layer) for layer in model] == [nn.Linear, SparseLinear]


@pytest.mark.parametrize("task", ["mlm", "classification", "tagging", "srl", "seq2seq"])
def test_a_model_answers_the_same_and_holds_what_the_arithmetic_says(task):
    model, _ = pruned(task, 0.9)
    dense, before = copy.deepcopy(model), held_bytes(model)
    shapes = [layer.weight.shape for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert make_sparse(model) == len(shapes)
    density = [1 - round(0.9 * m * n) / (m * n) for m, n in shapes]
    after = sum(share * 8 * m * n + 4 * (m + 1) for share, (m, n) in zip(density, shapes, strict=True))
    assert held_bytes(model) == round(before - sum(4 * m * n for m, n in shapes) + after) < 0.6 * before
    inputs = PackedInputs.whole_rows(torch.randint(100, (3, 9)))
    arguments = (inputs, inputs) if task == "seq2seq" else (inputs, torch.arange(9).expand(3, 9))
    for each in (model, copy.deepcopy(model)):
        with torch.inference_mode():
            found, expected = each(*arguments), dense(*arguments)
        assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_a_shared_layer_becomes_sparse_once_and_stays_shared():
    model, _ = pruned("seq2seq", 0.9)
    model.decoder.blocks[0].feed_forward = model.encoder.blocks[0].feed_forward
    make_sparse(model)
    assert isinstance(model.encoder.blocks[0].feed_forward.input, SparseLinear)
    assert model.decoder.blocks[0].feed_forward.input is model.encoder.blocks[0].feed_forward.input


def test_a_model_without_enough_zeros_is_refused():
    model, _ = pruned("tagging", 0.4)
    with pytest.raises(UserError, match=r"^weights: sparse, but no layer of this model has enough zeros"):
        make_sparse(model)
