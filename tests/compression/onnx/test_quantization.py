"""Names of layers are modules and lead to their nodes; exceptions stay in 32 bits."""

import math
from collections import Counter

import onnx
import pytest
import torch

from leanbert.compression.onnx import quantization
from leanbert.compression.onnx.folder import largest_difference, write_onnx
from leanbert.compression.onnx.graphs import graphs_of, write_graph
from leanbert.compression.onnx.quantization import fold, layers_of, quantize_folded
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.compression.steps import apply_steps, parse_steps
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs
from tests.compression.onnx.models import make

slow = pytest.mark.slow
FLOAT, EIGHT_BITS = [onnx.TensorProto.FLOAT], [onnx.TensorProto.INT8, onnx.TensorProto.UINT8]
QKV = "encoder.blocks.0.attention.qkv"


def blocks(wide=2):
    """Return how many matrices each layer of two encoder blocks is made of; the gated input has two."""
    parts = {"attention.qkv": 3, "attention.output": 1, "feed_forward.input": wide, "feed_forward.output": 1}
    return {f"encoder.blocks.{index}.{name}": count for index in (0, 1) for name, count in parts.items()}


def both(wide=2):
    """Return the same with three blocks of a decoder."""
    own = {name.removeprefix("encoder.blocks.0."): count for name, count in blocks(wide).items() if ".0." in name}
    cross = {"cross_attention.query": 1, "cross_attention.key_value": 2, "cross_attention.output": 1}
    parts = {f"decoder.blocks.{index}.{name}": count for index in range(3) for name, count in (own | cross).items()}
    return blocks(wide) | parts


EMBEDDING = {"encoder.embeddings.token": 1}
EMBEDDINGS = {**EMBEDDING, "encoder.embeddings.segment": 1, "encoder.embeddings.position": 1}
HEAD, LABELS, TEXT = {"head": 1, "head.dense": 1}, {"head.dense": 1, "head.scores": 1}, ("head.pooler", "head.scores")


def folded(tmp_path, model, metadata):
    """Write the graphs of a model as quantizers take them, and return their folder."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "folded").mkdir()
    for name, graph in graphs_of(model).items():
        write_graph(graph, tmp_path / "plain" / name, metadata)
    fold(tmp_path / "plain", tmp_path / "folded")
    return tmp_path / "folded"


def matrices(folder, types):
    """Return the shapes of the matrices of some types in all files, but for scales."""
    return Counter(
        tuple(sorted(tensor.dims))
        for file in folder.glob("*.onnx")
        for tensor in onnx.load(file).graph.initializer
        if tensor.data_type in types and len(tensor.dims) == 2 and not tensor.name.endswith("_scales")
    )


@pytest.mark.parametrize(
    ("task", "settings", "expected"),
    [
        ("mlm", {"preset": "bert"}, {**EMBEDDINGS, **blocks(wide=1), **HEAD}),
        pytest.param("mlm", {}, {**EMBEDDING, **blocks(), **HEAD}, marks=slow),
        ("classification", {}, {**EMBEDDING, **blocks(), **LABELS}),
        pytest.param(
            "classification", {"preset": "bert"}, {**EMBEDDINGS, **blocks(wide=1), **dict.fromkeys(TEXT, 1)}, marks=slow
        ),
        pytest.param("tagging", {}, {**EMBEDDING, **blocks(), **LABELS}, marks=slow),
        pytest.param("tagging", {"preset": "bert"}, {**EMBEDDINGS, **blocks(wide=1), "head.scores": 1}, marks=slow),
        pytest.param(  # the embedding is in both files
            "seq2seq", {"copy": True},
            {"encoder.embeddings.token": 2, **both(), **HEAD}
            | {f"pointer.{name}": 1 for name in ("query", "key", "gate")},
        ),
        pytest.param(
            "seq2seq", {"preset": "bert", "targets": 70},
            {
                **{name: 1 for name in EMBEDDINGS if "segment" not in name}, **both(wide=1), **HEAD,
                "decoder.embeddings.token": 1, "decoder.embeddings.position": 1,
            }, marks=slow,
        ),
    ],
)  # fmt: skip
def test_each_layer_is_a_module_and_alone_stays_in_32_bits(tmp_path, task, settings, expected):
    model, metadata = make(task, **settings)
    source = folded(tmp_path, model, metadata)
    whole, table, shared = matrices(source, FLOAT), Counter(), ()
    if "head" in expected:  # its matrix is a table of tokens, and both are one unless they differ in bits
        tokens = "decoder.embeddings.token" if "decoder.embeddings.token" in expected else "encoder.embeddings.token"
        table, shared = Counter([tuple(sorted(model.get_parameter(f"{tokens}.weight").shape))]), (tokens, "head")
    assert set(expected) <= {name for name, _ in model.named_modules()}
    target = tmp_path / "target"
    target.mkdir()
    for name, count in expected.items():
        quantize_folded(source, target, "int8", [name])
        left = matrices(target, FLOAT)
        assert left.total() == count, name
        once = Counter() if name in shared else table
        assert left + matrices(target, EIGHT_BITS) == whole - once, name  # all others have 8 bits
    assert layers_of(source, "int8") == sorted(expected)
    assert layers_of(source, "int8_int4") == sorted(expected)
    of_text = [name for name in expected if task == "classification" and name.startswith("head.")]
    assert layers_of(source, "int4") == sorted(set(expected) - set(of_text))  # one row a text: another operator
    quantize_folded(source, target, "int4", [])
    assert matrices(target, FLOAT).total() == len(of_text)
    quantize_folded(source, target, "int4", [QKV])
    assert matrices(target, FLOAT).total() == len(of_text) + 3


@pytest.mark.parametrize(
    ("scheme", "exceptions", "bits"),
    [("int8", [], 8), ("int4", [], 5), ("int4", ["encoder.embeddings.token", "head"], 32), ("int4", ["head"], 0)],
)
def test_a_table_that_is_the_outputs_matrix_is_in_the_file_once(tmp_path, monkeypatch, scheme, exceptions, bits):
    model, metadata = make("mlm", hidden_size=256)
    source, once, twice = folded(tmp_path, model, metadata), tmp_path / "once", tmp_path / "twice"
    for folder in (once, twice):
        folder.mkdir()
        quantize_folded(source, folder, scheme, exceptions)
        monkeypatch.setattr(quantization, "tied_nodes", lambda graph: [])
    sizes = [(folder / "model.onnx").stat().st_size for folder in (once, twice)]
    saved = model.encoder.embeddings.token.weight.numel() * bits / 8
    assert sizes[1] - sizes[0] == pytest.approx(saved, abs=1500)
    differences = [largest_difference(model, read_onnx(folder)) for folder in (once, twice)]
    # a scale for each token in place of one for all; in blocks the same
    assert differences[0] <= differences[1] * (1.2 if scheme == "int8" else 1)


def test_blocks_that_would_be_filled_up_are_not_shared(tmp_path):
    model, metadata = make("mlm", hidden_size=48)
    write_onnx(model, tmp_path, metadata, "int4")
    assert largest_difference(model, read_onnx(tmp_path)) < 0.3


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_files_grow_by_the_bits_that_stay(tmp_path, scheme):
    model, metadata = make("tagging", hidden_size=128, num_heads=4)
    source, target = folded(tmp_path, model, metadata), tmp_path / "target"
    target.mkdir()

    def size(exceptions):
        quantize_folded(source, target, scheme, exceptions)
        return (target / "model.onnx").stat().st_size

    qkv, scales = 3 * 128 * 128, 3 * 128 * (5 if scheme == "int8" else 4 * 4)  # int8: also zero points
    saved = qkv * 4 - qkv * (8 if scheme == "int8" else 4) // 8 - scales
    assert size([QKV]) - size([]) == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize(("task", "width"), [("tagging", 48), pytest.param("seq2seq", 64, marks=slow)])
def test_the_mixed_scheme_is_int8_with_embeddings_in_blocks_of_4_bits(tmp_path, task, width):
    model, metadata = make(task, preset="bert", hidden_size=width)
    source = folded(tmp_path, model, metadata)
    tables, others, files = {}, {}, {}
    for scheme in ("int8", "int8_int4"):
        target = tmp_path / scheme
        target.mkdir()
        quantize_folded(source, target, scheme, [])
        graphs = [onnx.load(file).graph for file in target.glob("*.onnx")]
        tensors = [tensor for graph in graphs for tensor in graph.initializer]
        tables[scheme] = sum(bits(tensor) for tensor in tensors if is_table(tensor)) // 8
        others[scheme] = sorted((t.name, onnx.numpy_helper.to_array(t).tobytes()) for t in tensors if not is_table(t))
        files[scheme] = sum(file.stat().st_size for file in target.glob("*.onnx"))
    rows = [128, 2, 32] if task == "tagging" else [128, 32, 32]  # the decoder's is in the file of the output's product
    blocks_of_row = -(-width // 32)
    assert tables["int8"] == sum(count * width + 4 + 1 for count in rows)  # one scale and one zero point a table
    assert tables["int8_int4"] == sum(count * width // 2 + count * blocks_of_row * 4 for count in rows)
    assert others["int8"] == others["int8_int4"]
    saved = tables["int8"] - tables["int8_int4"]
    assert files["int8"] - files["int8_int4"] == pytest.approx(saved, abs=200 * len(rows))


def is_table(tensor):
    return "embeddings" in tensor.name and not any(part in tensor.name for part in ("norm", "_rows", "_last_axis"))


def bits(tensor):
    width = {onnx.TensorProto.FLOAT: 32, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT8: 8}[tensor.data_type]
    return math.prod(tensor.dims) * width


@slow
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8_int4"])
def test_a_model_of_which_more_is_left_out_is_nearer(tmp_path, scheme):
    model, metadata = make("seq2seq")
    names = sorted({*EMBEDDING, *both(), *HEAD})
    differences = []
    for exceptions in ([], names[:-1]):
        write_onnx(model, tmp_path / str(len(exceptions)), metadata, scheme, exceptions)
        differences.append(largest_difference(model, read_onnx(tmp_path / str(len(exceptions)))))
    assert 1e-4 < differences[1] < 0.8 * differences[0]  # one layer alone; the encoder's file is whole
    assert (tmp_path / "0/encoder_model.onnx").stat().st_size < (
        tmp_path / f"{len(names) - 1}/encoder_model.onnx"
    ).stat().st_size


@slow
def test_both_factors_of_a_layer_of_low_rank_stay(tmp_path):
    model, metadata = make("tagging", hidden_size=64)
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    apply_steps(model, parse_steps(["low_rank=0.5"]), lambda model: model(PackedInputs.whole_rows(ids)))
    source, target = folded(tmp_path, model, metadata), tmp_path / "target"
    target.mkdir()
    quantize_folded(source, target, "int8", [QKV])
    assert matrices(target, FLOAT).total() == 4  # one for all, and the parts of the other


@slow
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_an_embedding_of_low_rank_is_written_and_quantized(tmp_path, scheme):
    model, metadata = make("tagging", hidden_size=64, num_heads=4)
    ids = torch.randint(100, (4, 16), generator=torch.Generator().manual_seed(0))
    run = lambda model: model(PackedInputs.whole_rows(ids))  # noqa: E731
    write_onnx(model, tmp_path / "whole", metadata, scheme)
    assert apply_steps(model, parse_steps(["low_rank_embedding=0.5"]), run) is None
    rank = model.encoder.embeddings.token.weight.shape[1]
    write_onnx(model, tmp_path / "thin", metadata, scheme)
    whole, thin = ((tmp_path / name / "model.onnx").stat().st_size for name in ("whole", "thin"))
    fewer = 128 * 64 - rank * (128 + 64)
    if scheme == "int4":  # a rank below 32 takes as many bytes
        assert 0 < whole - thin < fewer
    else:
        assert whole - thin == pytest.approx(fewer * (1 if scheme else 4), rel=0.25)


@pytest.mark.parametrize(
    ("exceptions", "message"),
    [
        (
            ["encoder.blocks.0.atention.qkv"],
            r"'encoder\.blocks\.0\.atention\.qkv' is no layer that int8 quantizes\. The nearest are "
            r"encoder\.blocks\.0\.attention\.qkv, encoder\.blocks\.1\.attention\.qkv, encoder",
        ),
        (["encoder.final_norm"], r"'encoder\.final_norm' is no layer that int8 quantizes\. The nearest are "),
        ([*EMBEDDING, *blocks(), *LABELS], r"they are all layers, of which int8 would quantize none\. Leave some out"),
    ],
)
def test_exceptions_that_cannot_be_are_said_and_nothing_is_written(tmp_path, exceptions, message):
    model, metadata = make("tagging")
    with pytest.raises(UserError, match=f"^exceptions: {message}"):
        write_onnx(model, tmp_path / "new", metadata, "int8", exceptions)
    assert not (tmp_path / "new").exists()


def scale_of(graph, name):
    """Return the static scale of what the first product whose name begins so reads."""
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    product = next(node for node in graph.node if node.name.startswith(name) and node.op_type == "MatMul")
    return float(tensors[made[product.input[0]].input[1]])


def test_static_scales_are_those_of_what_products_have_read(tmp_path):
    model, metadata = make("tagging")
    source, target = folded(tmp_path, model, metadata), tmp_path / "target"
    target.mkdir()
    generator = torch.Generator().manual_seed(0)
    seen = [(PackedInputs.whole_rows(torch.randint(100, (3, 9), generator=generator)),) for _ in range(2)]
    read = []
    handle = model.encoder.blocks[1].attention.qkv.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        for (rows,) in seen:
            model.encode(rows)
    handle.remove()
    quantize_folded(source, target, "int8_static", [], seen)
    graph = onnx.load(target / "model.onnx").graph
    assert not [node for node in graph.node if "Dynamic" in node.op_type]
    scale = scale_of(graph, "encoder.blocks.1.attention.qkv/")
    low, high = min(x.min() for x in read), max(x.max() for x in read)
    assert scale == pytest.approx((high - low).item() / 255, rel=0.02)  # the table in 8 bits moves them a little
    assert matrices(target, FLOAT).total() == 0
    assert layers_of(source, "int8_static") == layers_of(source, "int8")
    assert largest_difference(model, read_onnx(target)) > 1e-3
    quantize_folded(source, target, "int8_static", [*EMBEDDING, *blocks()], seen)
    with torch.no_grad():
        torch.testing.assert_close(read_onnx(target).encode(*seen[0]), model.encode(*seen[0]), rtol=0, atol=1e-5)
    quantize_folded(source, target, "int8_static", [QKV], seen)
    assert matrices(target, FLOAT).total() == 3


@slow
def test_static_scales_of_a_decoder_are_of_what_it_has_read_of_targets(tmp_path):
    model, metadata = make("seq2seq", copy=True)
    source, target = folded(tmp_path, model, metadata), tmp_path / "target"
    target.mkdir()
    sources = PackedInputs.whole_rows(torch.arange(14).view(2, 7))
    targets = PackedInputs.whole_rows(torch.arange(40, 50).view(2, 5))
    read = []
    layer = model.decoder.blocks[2].cross_attention.query
    handle = layer.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad():
        expected = model(sources, targets)
    handle.remove()
    quantize_folded(source, target, "int8_static", [], [(sources, targets)])
    graph = onnx.load(target / "decoder_model.onnx").graph
    assert not [node for node in graph.node if "Dynamic" in node.op_type]
    scale = scale_of(graph, "decoder.blocks.2.cross_attention.query/")
    assert scale == pytest.approx((read[0].max() - read[0].min()).item() / 255, rel=0.02)
    difference = (read_onnx(target)(sources, targets) - expected).abs().max() / expected.abs().max()
    assert 1e-4 < difference < 0.1
