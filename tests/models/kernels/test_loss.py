import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from leanbert.models.kernels import loss
from leanbert.models.kernels.loss import Mixture, cross_entropy_sum, linear_cross_entropy_sum


def reference(logits, targets):
    flat = logits.flatten(0, -2).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 200, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_equal_torchs(monkeypatch, chunk, dtype):
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 7, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (3, 7), generator=generator)
    targets[0, 3] = targets[2, 6] = -100
    ours, theirs = cross_entropy_sum(logits, targets), reference(logits, targets)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(ours / 19, logits)
    (expected,) = torch.autograd.grad(theirs / 19, logits)
    assert torch.allclose(gradient, expected, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-7)
    assert gradient[0, 3].abs().max() == 0


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[3e4, -3e4], [-3e4, 3e4]], requires_grad=True)
    value = cross_entropy_sum(logits, torch.tensor([0, 0]))
    assert value.item() == 6e4
    value.backward()
    assert logits.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_only_ignored_targets_give_zero_and_no_nan():
    logits = torch.randn(2, 5, requires_grad=True)
    value = cross_entropy_sum(logits, torch.full((2,), -100))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros(2, 5))


def test_gradient_of_logits_that_were_cut_from_padding():
    wide = torch.randn(4, 64, requires_grad=True)
    cross_entropy_sum(wide[:, :50], torch.arange(4)).backward()
    assert wide.grad[:, 50:].abs().max() == 0
    assert wide.grad[:, :50].abs().min() > 0


def test_float64_gradients_pass_gradcheck():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    value = cross_entropy_sum(logits, torch.tensor([1, -100, 3]))
    (gradient,) = torch.autograd.grad(value, logits)
    expected = logits.softmax(-1) - F.one_hot(torch.tensor([1, 0, 3]), 4)
    assert torch.allclose(gradient[[0, 2]], expected[[0, 2]], atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 21, 50])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_head_equals_the_whole_logits(chunk, autocast):
    generator = torch.Generator().manual_seed(0)
    shapes, dtype = ((21, 16), (64, 16), (64,)), torch.float32 if autocast else torch.float64
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(0, 50, (21,), generator=generator)
    targets[[3, 20]] = -100
    hidden, weight, bias = inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = cross_entropy_sum(F.linear(hidden, weight, bias)[:, :50], targets)
        chunked = linear_cross_entropy_sum(hidden, weight, bias, targets, vocab_size=50, chunk=chunk)
    near = 0.02 if autocast else 1e-9
    assert chunked.item() == pytest.approx(whole.item(), rel=near)
    expected = torch.autograd.grad(whole / 19, inputs)
    for gradient, wanted in zip(torch.autograd.grad(chunked / 19, inputs), expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, wanted, rtol=near, atol=near * float(wanted.abs().max()))
    assert torch.autograd.grad(linear_loss(inputs, targets), weight)[0][50:].abs().max() == 0


def linear_loss(inputs, targets):
    return linear_cross_entropy_sum(*inputs, targets, vocab_size=50, chunk=4)


def test_chunked_head_never_has_all_logits():
    """The largest tensor is [chunk, V], forward and backward."""

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (64,) and out.ndim == 2:
                self.rows = max(self.rows, out.shape[0])
            return out

    inputs = [torch.randn(shape, requires_grad=True) for shape in ((40, 3), (64, 3), (64,))]
    with Largest() as largest:
        linear_loss(inputs, torch.arange(40)).backward()
    assert largest.rows == 4


def test_chunked_head_without_gradients():
    inputs = [torch.randn(shape) for shape in ((6, 16), (64, 16), (64,))]
    whole = cross_entropy_sum(F.linear(*inputs)[:, :50], torch.arange(6))
    assert linear_loss(inputs, torch.arange(6)).item() == pytest.approx(whole.item(), rel=1e-5)


def test_evaluation_makes_no_gradients_of_weights_that_need_some():
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return function(*args, **(kwargs or {}))

    inputs = [torch.randn(shape, requires_grad=True) for shape in ((8, 16), (64, 16), (64,))]
    counts = []
    for context in (torch.no_grad, torch.enable_grad):
        with context(), Products() as products:
            linear_loss(inputs, torch.arange(8))
        counts.append(products.count)
    assert counts == [2, 6]  # two chunks: their logits; and what goes to hidden states and weights


def smoothed_reference(logits, targets, smoothing):
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
    )


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
@pytest.mark.parametrize("chunk", [1, 200, 2**19])
def test_smoothing_equals_torchs(monkeypatch, smoothing, chunk):
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    wide = (5 * torch.randn(3, 7, 64, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 50, (3, 7), generator=generator)
    targets[0, 3] = targets[2, 6] = -100
    ours, theirs = (
        cross_entropy_sum(wide[..., :50], targets, smoothing),
        smoothed_reference(wide[..., :50], targets, smoothing),
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
    assert abs(ours.item() - cross_entropy_sum(wide[..., :50], targets).item()) > 0.1
    (gradient,) = torch.autograd.grad(ours / 19, wide)
    (expected,) = torch.autograd.grad(theirs / 19, wide)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient[..., 50:].abs().max() == 0
    assert gradient[0, 3].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothing_in_lower_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(21, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.arange(21)
    ours, theirs = cross_entropy_sum(logits, targets, 0.1), smoothed_reference(logits.float(), targets, 0.1)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(ours, logits)
    (expected,) = torch.autograd.grad(theirs, logits)
    assert torch.allclose(gradient, expected, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 50])
@pytest.mark.parametrize("autocast", [False, True])
def test_chunked_head_smooths_over_the_vocabulary_without_its_padding(chunk, autocast):
    generator = torch.Generator().manual_seed(0)
    shapes, dtype = ((21, 16), (64, 16), (64,)), torch.float32 if autocast else torch.float64
    inputs = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(0, 50, (21,), generator=generator)
    targets[[3, 20]] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = F.linear(*inputs)[:, :50]
        chunked = linear_cross_entropy_sum(*inputs, targets, vocab_size=50, chunk=chunk, smoothing=0.1)
    whole = smoothed_reference(logits.to(dtype), targets, 0.1)
    near = 0.02 if autocast else 1e-9
    assert chunked.item() == pytest.approx(whole.item(), rel=near)
    expected = torch.autograd.grad(whole / 19, inputs)
    for gradient, wanted in zip(torch.autograd.grad(chunked / 19, inputs), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=near, atol=near * float(wanted.abs().max()))


def mixed_reference(logits, targets, kept, other):
    counted = targets != -100
    own = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return -(kept.exp() * own.exp() + other.exp()).log()[counted].sum()


@pytest.mark.parametrize("chunk", [None, 1, 4, 50])
def test_a_mixture_adds_the_probabilities_of_both_parts(chunk):
    generator = torch.Generator().manual_seed(0)
    shapes = ((21, 16), (64, 16), (64,), (21,), (21,))
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[3:] = [-tensor.abs() - 0.1 for tensor in inputs[3:]]
    hidden, weight, bias, kept, other = (tensor.requires_grad_() for tensor in inputs)
    targets = torch.randint(0, 50, (21,), generator=generator)
    targets[[3, 20]] = -100
    logits = F.linear(hidden, weight, bias)[:, :50]
    if chunk is None:
        found = cross_entropy_sum(logits, targets, mixture=Mixture(kept, other))
    else:
        found = linear_cross_entropy_sum(
            hidden, weight, bias, targets, vocab_size=50, chunk=chunk, mixture=Mixture(kept, other)
        )
    whole = mixed_reference(logits, targets, kept, other)
    assert found.item() == pytest.approx(whole.item(), rel=1e-10)
    expected = torch.autograd.grad(whole / 19, inputs, retain_graph=True)
    for gradient, wanted in zip(torch.autograd.grad(found / 19, inputs), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        again = linear_cross_entropy_sum(
            hidden, weight, bias, targets, vocab_size=50, chunk=7, mixture=Mixture(kept, other)
        )
    assert again.item() == pytest.approx(whole.item(), rel=1e-10)
