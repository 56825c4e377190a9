"""What a model computes with in quantization-aware training is what its ONNX files hold."""

from collections import defaultdict

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from leanbert.compression.onnx.folder import write_onnx
from leanbert.compression.onnx.graphs import layer_of
from leanbert.compression.onnx.quantization import BLOCK
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.compression.rounding import ROUNDINGS, in_blocks, in_channels, set_rounding, table_in_blocks, whole
from leanbert.errors import UserError
from leanbert.models.embeddings import Embeddings
from leanbert.models.heads import MaskedLMHead
from leanbert.models.linear import Linear
from leanbert.models.packed_inputs import PackedInputs
from tests.compression.onnx.models import make

slow = pytest.mark.slow


def stored(folder):
    """Return by file and layer what its quantized matrices [outputs, inputs], or its table [rows, D], stand for."""
    found = defaultdict(list)
    for file in sorted(folder.glob("*.onnx")):
        graph = onnx.load(file).graph
        tensors = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        for node in graph.node:  # what is computed when the file is opened: a table that two nodes read
            if node.op_type == "Transpose" and node.input[0] in tensors:
                tensors[node.output[0]] = tensors[node.input[0]].T
            if node.op_type == "Reshape" and node.input[0] in tensors:
                tensors[node.output[0]] = tensors[node.input[0]].reshape(len(tensors[node.input[0]]), -1)
        for node in graph.node:
            inputs = [tensors.get(name) for name in node.input]
            name = node.input[0 if "Gather" in node.op_type else 1 if len(node.input) > 1 else 0]
            name = name.removesuffix("_quantized")
            if node.op_type == "MatMulNBits":
                size = {attribute.name: attribute.i for attribute in node.attribute}
                codes = np.stack([inputs[1] & 15, inputs[1] >> 4], -1).reshape(size["N"], -1, BLOCK).astype("f4") - 8
                matrix = (codes * inputs[2].reshape(size["N"], -1, 1)).reshape(size["N"], -1)[:, : size["K"]]
            elif node.op_type == "GatherBlockQuantized" and inputs[0].dtype == np.uint8:
                codes = np.stack([inputs[0] & 15, inputs[0] >> 4], -1).reshape(len(inputs[0]), -1).astype("f4") - 8
                matrix = codes * inputs[2].reshape(len(codes), -1).repeat(BLOCK, 1)
            elif node.op_type == "GatherBlockQuantized":
                matrix = inputs[0].astype("f4") * inputs[2].repeat(BLOCK, 1)[:, : inputs[0].shape[1]]
            elif node.op_type == "MatMulInteger":
                matrix = (inputs[1].astype("f4") * tensors[f"{name}_scale"]).T
            elif node.op_type == "Gather" and name.endswith("_rows"):
                rows = inputs[0].astype("f4")
                continue
            elif node.op_type == "Gather" and name.endswith("_scale"):
                matrix = rows * inputs[0][:, None]
            elif node.op_type == "Gather" and f"{name}_scale" in tensors:
                matrix = (inputs[0].astype("f4") - tensors[f"{name}_zero_point"]) * tensors[f"{name}_scale"]
            else:
                continue
            layer = layer_of(node.name)
            if file.name.startswith("decoder"):  # where the table may be the encoder's
                layer = layer.replace("encoder.embeddings.token", "decoder.embeddings.token")
            found[file.name, layer].append(matrix)
    return found


def computed(model):
    """Return by layer what a model computes with."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.round_weight:
            found[name] = module.round_weight(module.weight)
        elif isinstance(module, MaskedLMHead):
            table = model.target_table if model.task == "seq2seq" else model.encoder.embeddings.token.weight
            found[name] = module.round_weight(table)
        elif isinstance(module, Embeddings):
            roundings = {
                "token": module.round_tokens, "segment": module.round_segments, "position": module.round_positions,
            }  # fmt: skip
            for child, rounding in roundings.items():
                if rounding and (table := getattr(module, child)):
                    found[f"{name}.{child}"] = rounding(table.weight)
            if name.startswith("decoder"):
                found[f"{name}.token"] = module.round_tokens(model.target_table)
    return {name: matrix.detach().numpy() for name, matrix in found.items()}


@pytest.mark.parametrize("scheme", ROUNDINGS)
@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("tagging", {"hidden_size": 48}),  # not in whole blocks
        pytest.param("classification", {}, marks=slow),
        pytest.param("classification", {"preset": "bert"}, marks=slow),
        pytest.param("mlm", {"preset": "bert", "hidden_size": 128}, marks=slow),
        pytest.param("seq2seq", {"copy": True}, marks=slow),
        pytest.param("seq2seq", {"preset": "bert", "targets": 70}, marks=slow),
    ],
)
def test_weights_are_those_of_the_files_bit_for_bit(tmp_path, scheme, task, settings):
    model, metadata = make(task, **settings)
    write_onnx(model, tmp_path, metadata, scheme)
    set_rounding(model, scheme)
    found, expected = stored(tmp_path), computed(model)
    assert {layer for _, layer in found} == set(expected)
    for (_, layer), matrices in found.items():  # of a layer of several parts they come in any order
        parts = np.split(expected[layer], len(matrices))
        assert sorted((m + 0.0).tobytes() for m in matrices) == sorted((p + 0.0).tobytes() for p in parts), layer


@pytest.mark.parametrize(
    ("scheme", "inputs", "share"),
    [("int4", False, 0.03), ("int8_int4", True, 1e-4), ("int8_int4", False, 0.05), ("int8", True, 1e-3)],
)
def test_outputs_are_those_of_onnxruntime(tmp_path, scheme, inputs, share):
    """int4 reads products' inputs in 8 bits, block by block, where we leave them: see `accuracy_level`."""
    model, metadata = make("tagging", hidden_size=64)
    write_onnx(model, tmp_path, metadata, scheme)
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    outputs = read_onnx(tmp_path).encode(PackedInputs.whole_rows(ids))

    def difference():
        with torch.no_grad():
            return (model.encode(PackedInputs.whole_rows(ids)) - outputs).abs().max().item()

    plain = difference()
    set_rounding(model, scheme, inputs)
    assert difference() < share * plain
    set_rounding(model, None)
    assert difference() == plain


@pytest.mark.parametrize("rounding", [in_channels, in_blocks, table_in_blocks, whole])
def test_the_gradient_passes_straight_through(rounding):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = rounding(x)
    gradient = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    out.backward(gradient)
    assert torch.equal(x.grad, gradient)
    assert 0 < (out - x).abs().max().item() < 0.6
    assert torch.equal(rounding(out), out), "rounded numbers stay"
    assert torch.equal(rounding(torch.zeros(6, 40)), torch.zeros(6, 40))
    sixteen = rounding(x.detach().bfloat16())
    assert sixteen.dtype == torch.bfloat16
    assert torch.equal(sixteen, rounding(x.detach().bfloat16().float()).bfloat16())


def test_steps_and_scales():
    """By hand: a scale of 1 / 64 of the largest, -1 / 8 of the farthest, and 1 / 255 of the range."""
    row = torch.tensor([[1.0, -0.5, 0.26 / 64, 0.74 / 64]])
    assert in_channels(row).mul(64).tolist() == [[64.0, -32.0, 0.0, 1.0]]
    assert in_blocks(row).tolist() == [[1.0, -0.5, 0.0, 0.0]]
    assert in_blocks(torch.tensor([[-1.0, 1.0, 0.9, 0.7]])).tolist() == [[-1.0, 0.875, 0.875, 0.75]]
    halves = torch.tensor([[-8.0, 0.5, 1.5, -0.5]])
    assert in_blocks(halves).tolist() == [[-8.0, 1.0, 2.0, 0.0]]
    assert table_in_blocks(halves).tolist() == [[-8.0, 0.0, 2.0, 0.0]]
    wide = torch.tensor([[8.0] + [0.0] * 31 + [0.25]])
    assert in_blocks(wide)[0, -1] == 0.25, "a block of its own"
    assert whole(torch.tensor([-51.0, 0.4, 0.6, 204.0])).tolist() == [-51.0, 0.0, 1.0, 204.0]


def test_a_layer_without_a_switch_is_named():
    model, _ = make("tagging")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(
        UserError, match=r"^QuantizationAwareTraining: extra is a torch\.nn\.Linear, which is not rounded"
    ):
        set_rounding(model, "int8")
