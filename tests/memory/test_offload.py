import pytest
import torch

from leanbert.memory.checkpointing import set_checkpointing
from leanbert.memory.offload import DiskStorage
from leanbert.tasks.techniques import Techniques, apply
from tests.memory.test_checkpointing import gradients
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tiny import tiny_model, unequal_batch


@pytest.fixture
def everything(monkeypatch):
    """Store tensors of any size."""
    monkeypatch.setattr("leanbert.memory.offload.SMALLEST_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("technique", ["none", "checkpointing", "layer_major"])
def test_gradients_are_the_same(tmp_path, everything, technique, dtype):
    model, batch = tiny_model(dtype=dtype, preset="bert"), unequal_batch()
    if technique == "checkpointing":
        set_checkpointing(model.encoder.blocks, "input")
    if technique == "layer_major":
        for block in model.encoder.blocks:
            block.slice_rows = 3
    expected = gradients(model, batch)
    storage = model.encoder.storage = DiskStorage(tmp_path)
    for _ in range(2):
        for name, value in gradients(model, batch).items():
            if technique == "none":  # read back contiguous: another order of additions in some products
                near = 1e-12 if dtype == torch.float64 else 0.02
                torch.testing.assert_close(value, expected[name], rtol=near, atol=near)
            else:
                assert torch.equal(value, expected[name]), name
    assert storage.written_bytes > 0
    assert storage._waiting == 0
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_what_several_operations_save_is_written_once(tmp_path, everything):
    storage = DiskStorage(tmp_path)
    x = torch.randn(64, 64, requires_grad=True)
    with storage():
        hidden = x * 2  # saves nothing
        out = (hidden.sin() + hidden.cos()).sum()  # both save `hidden`
    assert storage.written_bytes == 64 * 64 * 4
    out.backward()
    assert torch.allclose(x.grad, 2 * ((2 * x).cos() - (2 * x).sin()))


def test_memory_that_is_used_again_is_stored_again(tmp_path, everything):
    """The allocator gives the place of a stored tensor to the next one of its size, at the same address."""
    storage = DiskStorage(tmp_path)
    x = torch.randn(64, 64, requires_grad=True)
    with storage():
        out = x
        for _ in range(20):
            out = (out * 1.1).sin()
    out.sum().backward()
    y = x.detach().clone().requires_grad_()
    out = y
    for _ in range(20):
        out = (out * 1.1).sin()
    out.sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_weights_and_small_tensors_stay(tmp_path):
    storage = DiskStorage(tmp_path)
    weight = torch.nn.Parameter(torch.randn(256, 256))
    x = torch.randn(8, 256)
    with storage():
        (x @ weight).sum().backward()
    assert storage.written_bytes == 0


def test_the_file_begins_anew_when_nothing_waits(tmp_path):
    storage = DiskStorage(tmp_path)
    for _ in range(3):
        with storage():
            out = torch.randn(256, 256, requires_grad=True).mul(1).sin().sum()
        out.backward()
        del out
    assert storage.written_bytes == 3 * 256 * 256 * 4
    assert storage._end == 256 * 256 * 4


def saved_outside(model, batch):
    """Bytes of activations that autograd keeps of a forward pass up to the head, and that are not stored elsewhere."""
    saved = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in weights:
            saved[place] = (tensor, tensor.untyped_storage().nbytes())  # kept, so that no place is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden, _ = model.hidden(batch.inputs, batch.decoder_inputs)
    hidden.sum().backward()
    return sum(size for _, size in saved.values())


@pytest.mark.parametrize("technique", [{}, {"keep": "input"}, {"slice_rows": 2}])
@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_nothing_of_encoder_and_decoder_stays(tmp_path, everything, preset, technique):
    batch = packed_batch()
    plain, model = (tiny_seq2seq(preset=preset, dtype=torch.float32) for _ in range(2))
    whole = saved_outside(plain, batch)
    apply(Techniques(storage=tmp_path, **technique), model)
    assert whole > 200_000
    assert saved_outside(model, batch) == 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (plain.get_parameter(name).grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-4)
    assert model.encoder.storage is model.decoder.storage
    assert model.encoder.storage._waiting == 0
