"""What a GPU computes is what the CPU computes; `pytest -m cuda`."""

from __future__ import annotations

import copy

import pytest
import torch

from leanbert.models.kernels.attention import attend, make_mask
from leanbert.models.kernels.loss import cross_entropy_sum, linear_cross_entropy_sum
from leanbert.models.packed_inputs import Documents, PackedInputs
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.optim.quantized_state import BlockCode, draw_int16, write_bfloat16
from tests.tiny import PlainTask, tiny_model, unequal_batch

pytestmark = pytest.mark.cuda


def gradients(model, batch):
    """Return the loss of a model and its gradients, on the CPU."""
    PlainTask(model).loss_sum(batch).backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters() if parameter.grad is not None}


def padded(batch):
    """Return a batch of `unequal_batch` whose rows end in padding, each in more of it than the one before."""
    place = torch.arange(batch.inputs.input_ids.shape[1])
    real = place[None] < 16 - torch.arange(len(batch))[:, None] // 2
    batch.inputs.document_ids = batch.inputs.document_ids.where(real, torch.tensor(-1))
    batch.targets = batch.targets.where(real.gather(1, batch.target_index), torch.tensor(-100))
    return batch


@pytest.mark.parametrize("preset", ["bert", "modern"])
@pytest.mark.parametrize("window", [0, 6])
def test_gradients_of_packed_padded_and_local_rows(preset, window):
    model = tiny_model(torch.float32, preset=preset, local_window=window, global_every=2)
    there = copy.deepcopy(model).cuda()
    batch = padded(unequal_batch())
    found = gradients(there, batch.to("cuda"))
    for name, gradient in gradients(model, batch).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def packed(seed=0, length=300):
    """Return projections bf16 [4, S, 3, 2, 64], and rows of one to many documents, some with padding."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(length)
    ids = torch.stack([place // 40, place // length, torch.where(place < 250, place // 130, -1), place // 7])
    fused = torch.randn(4, length, 3, 2, 64, generator=generator).bfloat16()
    return fused, PackedInputs(ids.clamp(min=0), ids.clamp(min=0), ids).delimited()


def attended(fused, inputs, window, device, dtype):
    """Return what attention gives, and its gradient for a loss that weights all of it, in float32 on the CPU."""
    leaf = fused.to(device, dtype, copy=True).requires_grad_()
    mask = make_mask(inputs.map(lambda tensor: tensor.to(device)), leaf, 64, 0.0, window)
    assert isinstance(mask, Documents) is (device == "cuda" and dtype is torch.bfloat16)
    out = attend(*leaf.transpose(1, 3).unbind(2), mask)
    (out.float() * torch.linspace(-1, 1, 64, device=device)).sum().backward()
    return out.detach().float().cpu(), leaf.grad.float().cpu()


@pytest.mark.parametrize("window", [(-1, -1), (16, 16), (-1, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_inside_documents_is_the_cpus_attention_with_a_mask(window, dtype):
    fused, inputs = packed()
    there = attended(fused, inputs, window, "cuda", dtype)
    here = attended(fused, inputs, window, "cpu", torch.float32)
    tolerance = 3e-2 if dtype is torch.bfloat16 else 1e-4
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_documents_do_not_see_each_other():
    fused, inputs = packed()
    before, _ = attended(fused, inputs, (-1, -1), "cuda", torch.bfloat16)
    fused[0, 40:80] += 1.0  # the second document of the first row
    after, _ = attended(fused, inputs, (-1, -1), "cuda", torch.bfloat16)
    same = (before == after).all(dim=(1, 3))  # [B, S]
    assert not same[0, 40:80].any()
    same[0, 40:80] = True
    assert same.all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_their_gradients(smoothing):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 32), torch.randn(128, 32), torch.randn(128)
    targets = torch.randint(100, (50,)).where(torch.arange(50) % 7 > 0, torch.tensor(-100))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device, copy=True).requires_grad_() for tensor in (hidden, weight, bias)]
        chunked = linear_cross_entropy_sum(*leaves, targets.to(device), vocab_size=100, chunk=16, smoothing=smoothing)
        whole = cross_entropy_sum((leaves[0] @ leaves[1].T)[:, :100], targets.to(device), smoothing)
        (chunked + whole).backward()
        results.append([tensor.detach().cpu() for tensor in (chunked, whole, *(leaf.grad for leaf in leaves))])
    for there, here in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_of_an_optimizers_state(bits, signed):
    code = BlockCode(bits, signed=signed, squarings=1 if signed else 2)
    values = torch.randn(64, code.block, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.square()
    draws = draw_int16(values.numel(), torch.device("cpu"), 1, 2).view_as(values)
    decoded = []
    for device in ("cpu", "cuda"):
        codes, scales = code.zeros(values.numel(), torch.device(device))
        code.encode(values.to(device, copy=True), draws.to(device), codes, scales)
        decoded.append(code.decode(codes, scales, torch.float32).cpu())
    same = torch.isclose(*decoded, rtol=1e-5, atol=0.0)
    assert same.float().mean() > 0.999  # a value between two levels may fall to the other side
    assert (decoded[1] - values).abs().max() <= 2.1 * (decoded[0] - values).abs().max()


def test_stochastic_rounding_is_bit_for_bit_the_same():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    draws = draw_int16(10_000, torch.device("cpu"), 3)
    results = []
    for device in ("cpu", "cuda"):
        target = torch.empty(10_000, dtype=torch.bfloat16, device=device)
        write_bfloat16(values.to(device, copy=True), draws.to(device), target)
        results.append(target.cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "tolerance"), [("adamw", 1e-5), ("adam", 1e-5), ("adafactor", 1e-5), ("muon", 2e-3)])
def test_three_updates(name, tolerance):
    """Muon iterates in bfloat16, on a CPU without such products in float32."""
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(torch.float32).to(device)
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-3, matrix_lr=1e-3))
        draw = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in model.parameters()])
    for there, here in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=0.0, atol=tolerance)


def test_a_batch_is_moved_from_pinned_memory():
    batch = unequal_batch().pin_memory()
    assert batch.inputs.input_ids.is_pinned()
    assert batch.targets.is_pinned()
    there = batch.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert isinstance(there.inputs, PackedInputs)
    assert torch.equal(there.inputs.document_ids.cpu(), batch.inputs.document_ids)
