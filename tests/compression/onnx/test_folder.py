"""What is written computes what the model does, is whole or not there, and says what it is."""

import copy
import errno

import onnx
import pytest
import torch

from leanbert.compression.onnx import folder as onnx_folder
from leanbert.compression.onnx import runtime
from leanbert.compression.onnx.folder import largest_difference, write_onnx
from leanbert.compression.onnx.graphs import graphs_of, write_graph
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.errors import UserError
from tests.compression.onnx.models import make

slow = pytest.mark.slow
LOCAL = {"local_window": 4, "global_every": 2}


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("mlm", LOCAL),
        ("seq2seq", {"copy": True}),
        pytest.param("mlm", {"preset": "bert"}, marks=slow),
        pytest.param("classification", {}, marks=slow),
        pytest.param("classification", {"preset": "bert"}, marks=slow),
        pytest.param("tagging", LOCAL, marks=slow),
        pytest.param("srl", {"preset": "bert"}, marks=slow),
        pytest.param("seq2seq", {"preset": "bert", "targets": 70}, marks=slow),
        pytest.param("seq2seq", {"preset": "bert", "position": "sinusoidal", "norm_position": "pre"}, marks=slow),
        pytest.param("classification", {"num_heads": 3, "head_size": 8, "intermediate_size": 20}, marks=slow),
    ],
)
def test_onnxruntime_computes_what_the_model_does(tmp_path, task, settings):
    """Batches of 1 and 7, lengths from 1 to the maximum, padding, packed documents: see `folder._rows`."""
    model, metadata = make(task, **settings)
    write_onnx(model, tmp_path / "new" / "folder", metadata)
    written = read_onnx(tmp_path / "new" / "folder")
    assert largest_difference(model, written) < 2e-6
    assert written.metadata == metadata
    assert written.config == model.config
    files = list((tmp_path / "new" / "folder").iterdir())
    assert {file.name for file in files} == set(graphs_of(model))
    assert {opset.version for file in files for opset in onnx.load(file).opset_import} == {23}


@pytest.mark.slow
def test_weights_of_16_bits_are_written_with_32_and_the_model_stays_as_it_is(tmp_path):
    model, metadata = make("classification")
    model.bfloat16().train()
    write_onnx(model, tmp_path, metadata)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.training
    assert largest_difference(model.float().eval(), read_onnx(tmp_path)) < 2e-6


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    model, metadata = make("classification")
    (tmp_path / "model.onnx").write_bytes(b"what was there")

    def write_another(graph, path, metadata):
        graph = copy.deepcopy(graph)
        with torch.no_grad():
            graph.model.head.scores.bias[0] += 0.01
        write_graph(graph, path, metadata)

    monkeypatch.setattr(onnx_folder, "write_graph", write_another)
    with pytest.raises(UserError, match=r"onnxruntime computes something else, by .*Nothing was written"):
        write_onnx(model, tmp_path, metadata)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"what was there"]
    monkeypatch.setattr(onnx_folder, "ROUNDINGS", 1e9)  # a model that rounds so much
    write_onnx(model, tmp_path, metadata)
    assert (tmp_path / "model.onnx").read_bytes() != b"what was there"


@pytest.mark.parametrize("full", ["folder", "TMPDIR"])
def test_the_disk_that_is_full_is_named(tmp_path, monkeypatch, full):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, metadata = make("classification")
    if full == "folder":
        monkeypatch.setattr(onnx_folder.shutil, "copyfile", no_space)
    else:
        monkeypatch.setattr(onnx_folder, "write_graph", no_space)
    with pytest.raises(UserError, match="the disk is full") as caught:
        write_onnx(model, tmp_path / "new", metadata)
    assert str(caught.value).startswith(f"{tmp_path / 'new'}: ") == (full == "folder")
    assert str(caught.value).endswith("choose another disk with TMPDIR") == (full == "TMPDIR")
    assert list(tmp_path.rglob("*.onnx*")) == []


@pytest.mark.slow
def test_steps_of_a_small_decoder_take_one_thread(tmp_path, monkeypatch):
    model, metadata = make("seq2seq")
    write_onnx(model, tmp_path, metadata)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = []
    for most in (runtime.FEW_BYTES, 0):
        monkeypatch.setattr(runtime, "FEW_BYTES", most)
        model = read_onnx(tmp_path)
        options = [each._session.get_session_options() for each in (model.session, model.decoder)]
        found.append([each.intra_op_num_threads for each in options])
    assert found == [[3, 1], [3, 3]]


def test_what_a_model_rounds_itself_is_no_difference(tmp_path, monkeypatch):
    model, metadata = make("tagging")
    monkeypatch.setattr(onnx_folder, "TOLERANCE", 0.0)
    write_onnx(model, tmp_path, metadata)
    assert (tmp_path / "model.onnx").is_file()
    monkeypatch.setattr(onnx_folder, "ROUNDINGS", 0)
    with pytest.raises(UserError, match="onnxruntime computes something else"):
        write_onnx(model, tmp_path, metadata)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "share", "error"), [("int8", 0.27, 0.05), ("int4", 0.18, 0.3), ("int8_int4", 0.265, 0.3)]
)
def test_quantized_files_are_small_and_near(tmp_path, scheme, share, error):
    model, metadata = make("tagging", hidden_size=128, num_layers=4)
    write_onnx(model, tmp_path / "fp32", metadata)
    write_onnx(model, tmp_path / scheme, metadata, scheme)
    plain, quantized = ((tmp_path / name / "model.onnx").stat().st_size for name in ("fp32", scheme))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert plain > weights
    assert quantized - (plain - weights) < share * weights
    written = read_onnx(tmp_path / scheme)
    assert written.metadata == metadata
    assert 1e-4 < largest_difference(model, written) < error


@pytest.mark.slow
def test_int8_does_not_overflow_where_sums_of_two_products_have_16_bits(tmp_path):
    """Without VNNI two products of 8 bits are added with saturation: weights must stay within 7 bits."""
    model, metadata = make("classification")
    write_onnx(model, tmp_path, metadata, "int8")
    graph = onnx.load(tmp_path / "model.onnx").graph
    weights = [
        onnx.numpy_helper.to_array(each) for each in graph.initializer if each.data_type == onnx.TensorProto.INT8
    ]
    assert len([weight for weight in weights if weight.ndim == 2]) == 2 * 7 + 2  # of two blocks and the head
    assert max(int(abs(weight.astype(int)).max()) for weight in weights) <= 64


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    model, metadata = make("classification")
    with pytest.raises(UserError, match=r"file/below: cannot be written"):
        write_onnx(model, tmp_path / "file" / "below", metadata)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"damaged", "cannot be read"), (None, "not a model of LeanBERT"), ("{}", "does not say what model it is")],
)
def test_files_that_are_not_ours_are_said_so(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [other])
        model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
        if content is not None:
            onnx.helper.set_model_props(model, {"leanbert": content})
        onnx.save(model, path)
    with pytest.raises(UserError, match=rf"model\.onnx: {message}"):
        read_onnx(tmp_path)


def test_half_a_model_is_said_so(tmp_path):
    (tmp_path / "encoder_model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match=r"there is encoder_model\.onnx, but no decoder_model\.onnx"):
        read_onnx(tmp_path)


def test_files_in_32_bits_are_quantized_without_making_them_again(tmp_path, monkeypatch):
    model, metadata = make("classification")
    write_onnx(model, tmp_path / "float32", metadata)
    write_onnx(model, tmp_path / "alone", metadata, "int8")
    monkeypatch.setattr(onnx_folder, "write_graph", None)
    write_onnx(model, tmp_path / "int8", metadata, "int8", float32=tmp_path / "float32")
    alone, again = (
        {path.name: path.stat().st_size for path in (tmp_path / name).iterdir()} for name in ("alone", "int8")
    )
    assert again == alone
    assert largest_difference(model, read_onnx(tmp_path / "int8")) == largest_difference(
        model, read_onnx(tmp_path / "alone")
    )
