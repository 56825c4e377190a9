"""Cross entropy over a large vocabulary without a float32 copy of the logits.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Target of a slot that does not count."""

CPU_CHUNK, DEVICE_CHUNK = 2**19, 2**25
"""Logits that are in float32 at a time: what fits a core's cache, or what fills an accelerator."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies (nats, at least float32) of `logits` [..., V] at `targets` (int64 [...]).

    Targets of -100 do not count. Equals `F.cross_entropy(logits.float(), ..., reduction="sum")`, but float32
    values and probabilities exist for a few rows at a time only, in the forward and again in the backward.
    """
    return _CrossEntropySum.apply(logits.flatten(0, -2), targets.flatten())


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        counted = targets != IGNORED  # [N]
        wanted = targets.clamp(min=0)[:, None]  # [N, 1]
        rows = _rows_per_chunk(logits)
        wide = _wide_dtype(logits)
        normaliser = torch.cat([chunk.to(wide).logsumexp(-1) for chunk in logits.split(rows)])  # [N]
        score = logits.gather(1, wanted).squeeze(1).to(wide)  # [N]
        ctx.save_for_backward(logits, wanted, counted, normaliser)
        return torch.where(counted, normaliser - score, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, wanted, counted, normaliser = ctx.saved_tensors
        scale = torch.where(counted, upstream, 0.0)[:, None]  # [N, 1]
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        each = (gradient, logits, wanted, normaliser[:, None], scale)
        rows = _rows_per_chunk(logits)
        for out, chunk, target, norm, factor in zip(*(x.split(rows) for x in each), strict=True):
            probability = chunk.to(norm.dtype).sub(norm).exp_()
            out.copy_(probability.mul_(factor).scatter_add_(1, target, -factor))
        return gradient, None


def _wide_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _rows_per_chunk(logits: Tensor) -> int:
    elements = CPU_CHUNK if logits.device.type == "cpu" else DEVICE_CHUNK
    return max(1, elements // logits.shape[-1])
