"""Cross entropy over a large vocabulary without a float32 copy of the logits.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanbert.measure.target import target_type
from leanbert.models.kernels.attention import product_dtype
from leanbert.slices import parts, rounds

IGNORED = -100
"""Target that does not count."""

CPU_CHUNK, DEVICE_CHUNK = 2**19, 2**25
"""Logits that are in float32 at a time: what fits a core's cache, or what fills an accelerator."""

GRADIENT_BLOCK = 2**20
"""Elements of the vocabulary's gradient that a 16-bit product is added to at a time."""


class Mixture(NamedTuple):
    """What else a target may come from than the vocabulary, at least float32 [N] each.

    `log_weight`: logarithm of the vocabulary's part; `log_probs`: log-probability of the target by the rest.
    """

    log_weight: Tensor
    log_probs: Tensor


def cross_entropy_sum(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    vocab_size: int | None = None,
    mixture: Mixture | None = None,
) -> Tensor:
    """Sum of the cross entropies (nats, at least float32) of `logits` [..., V] at `targets` (int64 [...]).

    Targets of -100 do not count. Equals `F.cross_entropy(logits.float(), ..., reduction="sum")`, but float32
    values and probabilities exist for a few rows at a time only, in the forward and again in the backward.
    With `smoothing` this fraction of each target is spread over the first `vocab_size` labels (None: all): Szegedy et
    al. 2016, arXiv 1512.00567. With a `mixture` a target has the probability of both parts together.
    """
    size = logits.shape[-1] if vocab_size is None else vocab_size
    flat = targets.flatten()
    losses = _CrossEntropies.apply(logits.flatten(0, -2), flat, smoothing, size)
    if mixture is not None:
        losses = torch.where(flat == IGNORED, 0.0, -torch.logaddexp(mixture.log_weight - losses, mixture.log_probs))
    return losses.sum()


class _CrossEntropies(torch.autograd.Function):
    """Logits [N, V] and targets [N] to cross entropies [N], 0 where a target does not count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float, size: int) -> Tensor:
        counted = targets != IGNORED  # [N]
        wanted = targets.clamp(min=0)[:, None]  # [N, 1]
        wide = _wide_dtype(logits)
        score = logits.gather(1, wanted).squeeze(1).to(wide)  # [N]
        normaliser, mean = torch.empty_like(score), torch.empty_like(score) if smoothing else None
        for part in _in_float32(logits):
            normaliser[part] = _log_sum_exp(logits[part].to(wide))
            if mean is not None:
                mean[part] = logits[part, :size].to(wide).mean(-1)
        if mean is not None:
            score = torch.lerp(score, mean, smoothing)
        ctx.save_for_backward(logits, wanted, counted, normaliser)
        ctx.smoothing, ctx.size = smoothing, size
        return torch.where(counted, normaliser - score, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, wanted, counted, normaliser = ctx.saved_tensors
        scale = torch.where(counted, grad_output, 0.0)[:, None]  # [N, 1]
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        for part in _in_float32(logits):
            factor = scale[part]
            probability = logits[part].to(normaliser.dtype).sub(normaliser[part, None]).exp_().mul_(factor)
            probability.scatter_add_(1, wanted[part], (ctx.smoothing - 1.0) * factor)
            if ctx.smoothing:
                probability[:, : ctx.size] -= ctx.smoothing / ctx.size * factor
            grad_logits[part] = probability
            del probability  # before the next is made
        return grad_logits, None, None, None


def linear_cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    chunk: int,
    smoothing: float = 0.0,
    mixture: Mixture | None = None,
) -> Tensor:
    """Sum of the cross entropies (nats) of `hidden` [N, D] against `weight` [R, D] and `bias` [R] at `targets` [N].

    The first `vocab_size` of the R rows count. Logits [chunk, R] exist for `chunk` targets at a time only. Equals
    `cross_entropy_sum` of the logits (with its `smoothing` and `mixture`): the gradients are made chunk by chunk in the
    forward pass, while the logits are there, so nothing is computed twice (as in Liger Kernel, Hsu et al. 2024, arXiv
    2410.10989); the gradients of weight and bias are summed in at least float32. Can be back-propagated once. Exact.
    """
    inputs = (hidden, weight, bias, *(mixture or (None, None)))
    if not torch.is_grad_enabled():  # which the function itself is not told
        inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    return _LinearCrossEntropySum.apply(*inputs, targets, vocab_size, chunk, smoothing)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_weight: Tensor | None,
        log_probs: Tensor | None,
        targets: Tensor,
        vocab_size: int,
        chunk: int,
        smoothing: float,
    ) -> Tensor:
        wide, product = _wide_dtype(hidden), product_dtype(hidden)
        inputs = (hidden, weight, bias, log_weight, log_probs)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        summed_in = (hidden.dtype, wide, wide, wide, wide)
        ctx.gradients = [
            torch.zeros_like(tensor, dtype=dtype) if needed and tensor is not None else None
            for tensor, dtype, needed in zip(inputs, summed_in, ctx.needs_input_grad, strict=False)
        ]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        matrix, shift = weight.to(product), bias.to(product)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in rounds(parts(len(hidden), chunk), hidden):
                part = hidden[rows].to(product)
                logits = F.linear(part, matrix, shift)  # [chunk, R]
                logits[:, vocab_size:] = float("-inf")
                mixed = [tensor[rows].detach().requires_grad_() for tensor in inputs[3:] if tensor is not None]
                with torch.enable_grad():
                    mixture = Mixture(*mixed) if mixed else None
                    loss = cross_entropy_sum(logits.requires_grad_(), targets[rows], smoothing, vocab_size, mixture)
                total += loss.detach()
                if any(ctx.needs_input_grad):
                    grad_logits, *others = torch.autograd.grad(loss, (logits, *mixed))  # [chunk, R], [chunk] each
                    _add_gradients(ctx.gradients[:3], rows, grad_logits, part, matrix)
                    for whole, own in zip(ctx.gradients[3:], others, strict=False):
                        if whole is not None:
                            whole[rows] = own
                    del grad_logits
                del logits, loss  # before the next are made
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a copy of the weight's would be large
        scaled = (g if g is None else g.mul_(grad_output).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None


def _add_gradients(sums: list[Tensor | None], rows: slice, grad_logits: Tensor, part: Tensor, matrix: Tensor) -> None:
    """Add what one chunk contributes to the gradients of hidden states, weight and bias."""
    for_hidden, for_weight, for_bias = sums
    if for_hidden is not None:
        for_hidden[rows] = grad_logits @ matrix
    if for_weight is not None and for_weight.dtype == grad_logits.dtype:
        for_weight.addmm_(grad_logits.mT, part)  # without a second matrix of that size
    elif for_weight is not None:  # row by row block: to add 16-bit numbers to a float32 matrix, torch copies them all
        step = max(1, GRADIENT_BLOCK // for_weight.shape[1])
        for block in rounds(parts(len(for_weight), step), grad_logits):
            for_weight[block] += (grad_logits[:, block].mT @ part).to(for_weight.dtype)
    if for_bias is not None:
        for_bias += grad_logits.sum(0, dtype=for_bias.dtype)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Return [N], of [N, V] the logarithm of the sum of exponentials; torch's own makes tensors that no trace sees."""
    most = logits.amax(-1, keepdim=True)
    return (logits - most).exp_().sum(-1).log_().add_(most.squeeze(-1))


def _wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _in_float32(logits: Tensor) -> Iterable[slice]:
    """Return the rows that are in float32 at a time."""
    elements = CPU_CHUNK if target_type(logits) == "cpu" else DEVICE_CHUNK
    return rounds(parts(len(logits), max(1, elements // logits.shape[-1])), logits)
