"""Bytes by hand, models back as they were, and files that are not what was written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from leanbert.compression.low_rank import make_low_rank
from leanbert.compression.structured import prune_structured
from leanbert.data.store.checksums import file_digest
from leanbert.errors import UserError
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import read_model, rebuild
from leanbert.pretrained.sparse import pack, unpack, write_sparse
from tests.compression.onnx.models import make, pruned


def damage(folder, change):
    """Change the tensors, and say that they are what was written."""
    path, settings = folder / "model.safetensors", folder / "leanbert.json"
    state = load_file(path)
    change(state)
    save_file(state, path)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"weights": file_digest(path)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [0, 50, 80, 100])
def test_bytes_are_those_of_the_arithmetic(dtype, zeros):
    tensor = torch.randn(20, 15).abs().add(0.1).to(dtype)
    tensor.view(-1)[torch.randperm(300)[: 3 * zeros]] = 0.0
    packed, left = pack(tensor), 300 - 3 * zeros
    if zeros == 0:
        assert packed is None
        return
    assert packed.mask.nbytes == 38  # ceil(300 / 8)
    assert packed.values.nbytes == left * dtype.itemsize
    found = unpack(packed, tensor.shape)
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_packed_where_that_is_smaller(dtype):
    """Of 64 weights the mask takes 8 bytes: as many as the values of two zeros in 32 bits, of four in 16."""
    tensor, equal = torch.ones(64, dtype=dtype), 8 // dtype.itemsize
    tensor[:equal] = 0.0
    assert pack(tensor) is None
    tensor[equal] = 0.0
    assert pack(tensor).values.numel() == 63 - equal


def test_the_mask_has_the_first_weight_in_the_highest_bit_and_zeros_have_no_sign():
    tensor = torch.tensor([[1.5, 0.0, -0.0, 0.0, float("nan")], [0.0, 0.0, 0.0, 0.0, -2.0]])
    packed = pack(tensor)
    assert packed.mask.tolist() == [0b10001000, 0b01000000]
    assert str(packed.values.tolist()) == "[1.5, nan, -2.0]"
    assert str(unpack(packed, tensor.shape).tolist()) == "[[1.5, 0.0, 0.0, 0.0, nan], [0.0, 0.0, 0.0, 0.0, -2.0]]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("mlm", {"local_window": 4, "global_every": 2}),
        ("mlm", {"preset": "bert", "position": "sinusoidal"}),
        ("classification", {"preset": "bert"}),
        ("tagging", {}),
        ("srl", {"preset": "bert"}),
        ("seq2seq", {"copy": True}),
        ("seq2seq", {"preset": "bert", "targets": 70}),
    ],
)
def test_a_model_of_any_task_comes_back_bit_for_bit(tmp_path, task, settings, dtype):
    model, metadata = pruned(task, **settings)
    model.to(dtype)
    write_sparse(model, tmp_path / "new" / "folder", metadata)
    stored = read_model(tmp_path / "new" / "folder")
    assert (stored.config, stored.metadata) == (model.config, metadata)
    state, expected = stored.read_weights(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    rebuilt = rebuild(stored, 100, settings.get("targets")).state_dict()
    assert all(torch.equal(rebuilt[name], tensor.float()) for name, tensor in state.items())


def test_the_file_has_what_the_arithmetic_says(tmp_path):
    model, metadata = pruned("tagging", 0.75)
    write_sparse(model, tmp_path, metadata)
    stored, expected = load_file(tmp_path / "model.safetensors"), 0
    for name, parameter in model.named_parameters():
        kept, count = int(parameter.count_nonzero()), parameter.numel()
        packed = -(-count // 8) + 4 * kept
        expected += min(packed, 4 * count)
        assert (f"{name}.mask" in stored) == (packed < 4 * count) == (name not in stored), name
    assert sum(tensor.nbytes for tensor in stored.values()) == expected
    matrix = "encoder.blocks.0.attention.qkv.weight"  # [96, 32]
    assert stored[f"{matrix}.mask"].nbytes + stored[f"{matrix}.values"].nbytes == 96 * 32 // 8 + 96 * 32 // 4 * 4


def test_heads_and_neurons_that_were_removed_are_not_there(tmp_path):
    model, metadata = pruned("classification")
    prune_structured(model, heads_kept=1, neurons_kept=40)
    write_sparse(model, tmp_path, metadata)
    found = rebuild(read_model(tmp_path), 100)
    assert (found.config.num_heads, found.config.head_size, found.config.intermediate_size) == (1, 16, 40)
    assert all(torch.equal(weight, found.state_dict()[name]) for name, weight in model.state_dict().items())


def test_what_encoder_and_decoder_share_is_there_once_and_shared_again(tmp_path):
    model = Seq2SeqModel(make("seq2seq")[0].config, 2, "shared")
    metadata = ModelMetadata("seq2seq", decoder_layers=2, decoder_start="shared")
    write_sparse(model, tmp_path, metadata)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) <= sum(p.nbytes for p in model.parameters())
    found = rebuild(read_model(tmp_path), 100)
    assert found.decoder.blocks[1].feed_forward is found.encoder.blocks[1].feed_forward
    assert all(torch.equal(weight, found.state_dict()[name]) for name, weight in model.state_dict().items())


def test_other_layers_than_the_settings_say_are_refused(tmp_path):
    model, metadata = make("tagging")
    make_low_rank(model, 0.5)
    with pytest.raises(UserError, match=r"the model has other layers than its settings say, such as low-rank ones"):
        write_sparse(model, tmp_path / "new", metadata)
    assert not (tmp_path / "new").exists()


MATRIX = "encoder.blocks.1.feed_forward.input.weight"


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("mask", lambda mask: mask[1:].clone(), r"has a mask \[\d+\] for \d+ weights"),
        ("mask", lambda mask: mask.short(), r"has a mask \[\d+\] for \d+ weights"),
        ("mask", lambda mask: torch.full_like(mask, 255), r"has \d+ bits in its mask for \d+ of \d+ weights"),
        ("values", lambda values: values[1:].clone(), r"has \d+ bits in its mask for \d+ of \d+ weights"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, part, change, message):
    model, metadata = pruned("tagging")
    write_sparse(model, tmp_path, metadata)
    damage(tmp_path, lambda state: state.update({f"{MATRIX}.{part}": change(state[f"{MATRIX}.{part}"])}))
    with pytest.raises(UserError, match=rf"model\.safetensors: {MATRIX} {message}\. Export the model again\.$"):
        read_model(tmp_path).read_weights()


def test_bits_after_the_last_weight_are_damage():
    packed = pack(torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]))
    packed.mask[0] = 0b00000001
    with pytest.raises(ValueError, match=r"^has 1 bits in its mask for 1 of 5 weights$"):
        unpack(packed, torch.Size([5]))


@pytest.mark.parametrize("name", [f"{MATRIX}.mask", f"{MATRIX}.values", "encoder.final_norm.weight"])
def test_a_tensor_that_is_missing_is_named(tmp_path, name):
    model, metadata = pruned("tagging")
    write_sparse(model, tmp_path, metadata)
    damage(tmp_path, lambda state: state.pop(name))
    with pytest.raises(UserError, match=rf"model\.safetensors: lacks {name.removesuffix('.mask')}"):
        read_model(tmp_path).read_weights()


def test_a_tensor_too_many_or_of_another_shape_is_named(tmp_path):
    model, metadata = pruned("tagging")
    for name, message in (("more", "have unexpected more"), ("encoder.final_norm.weight", r"has shape \[3\]")):
        write_sparse(model, tmp_path, metadata)
        damage(tmp_path, lambda state, name=name: state.update({name: torch.ones(3)}))
        with pytest.raises(UserError, match=message):
            rebuild(read_model(tmp_path), 100)


def test_flipped_bits_and_files_of_two_exports_are_found(tmp_path):
    for folder, sparsity in (("a", 0.5), ("b", 0.8)):
        model, metadata = pruned("tagging", sparsity)
        write_sparse(model, tmp_path / folder, metadata)
    path = tmp_path / "a" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    for damaged in (content, (tmp_path / "b" / "model.safetensors").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged, or not what leanbert\.json was written"):
            read_model(tmp_path / "a").read_weights()
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read \(No such file"):
        read_model(tmp_path / "a").read_weights()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"version 2 of the format, here is 1\. Use the LeanBERT that wrote it$"),
        ({"version": None}, "version None of the format"),
        ({"encoder": {"layers": 3}}, r"does not say what model it is\. Export the model again\.$"),
        ({"encoder": None}, "does not say what model it is"),
        ({"labels": "O"}, r"leanbert\.labels 'O' is no such value\. Export the model again\.$"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, changes, message):
    model, metadata = pruned("tagging")
    write_sparse(model, tmp_path, metadata)
    path = tmp_path / "leanbert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=rf"leanbert\.json: {message}"):
        read_model(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"leanbert\.json:1: broken JSON"):
        read_model(tmp_path)
