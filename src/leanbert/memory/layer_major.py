"""Layer-major execution: each block runs over all slices of the batch before the next block starts.

Pudipeddi et al. 2020 (L2L, arXiv 2002.05645). A block's gradient is whole as soon as its backward pass is done, so an
optimizer that updates in the backward pass can free it at once, whatever the number of slices: accumulation without a
gradient buffer for the whole model. Only the block's input [B, S, D] is kept; the rest is computed again, slice by
slice, as in activation checkpointing. Exact.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from leanbert.memory.step import seed_position
from leanbert.slices import parts, rounds

ADDED = 2**16
"""Elements of a 16-bit gradient that are added to a float32 sum at a time."""


def run_in_slices(block: nn.Module, hidden: Tensor, context: object, rows: int, *more: Tensor) -> Tensor:
    """Return `block(hidden, context, *more)`, [B, S, D], computed `rows` rows at a time, forward and backward.

    Args:
        block: Called as `block(hidden, context, *more)`; each row of its output depends on the same row of its input.
        hidden: Input, [B, S, D].
        context: A tuple, nested tuples or None, of tensors; those whose first dimension is B are cut as well.
        rows: Rows of a slice, the last maybe smaller.
        more: Further inputs [B, ...] that may need gradients.

    Dropout is a function of torch's seed at the call, of the block's layer and of the slice; torch is left with another
    seed, which is a function of these.
    """
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
    return _Sliced.apply(_Call(block, context, rows, hidden), 1 + len(more), hidden, *more, *parameters)


class _Call:
    """What the backward pass needs to repeat the forward pass of one slice."""

    def __init__(self, block: nn.Module, context: object, rows: int, hidden: Tensor) -> None:
        self.block, self.context, self.rows = block, context, rows
        self.layer = getattr(block, "layer", 0)
        self.seed = torch.initial_seed()
        self.length = hidden.shape[0]
        self.device_type = hidden.device.type
        self.autocast = torch.is_autocast_enabled(self.device_type)
        self.dtype = torch.get_autocast_dtype(self.device_type)

    def precision(self) -> AbstractContextManager[Any]:
        # no cache: it would hold 16-bit copies of all weights
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.autocast, cache_enabled=False)

    def slices(self) -> list[slice]:
        return parts(self.length, self.rows)

    def run(self, index: int, part: slice, hidden: Tensor, *more: Tensor) -> Tensor:
        seed_position(self.seed, self.layer, index)
        return self.block(hidden, _cut(self.context, part, self.length), *more)

    def done(self) -> None:
        """Seed what comes after, such as the decoder's embeddings: not as what came before."""
        seed_position(self.seed, self.layer, len(self.slices()))


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, inputs: int, *tensors: Tensor) -> Tensor:
        ctx.call = call
        own, ctx.parameters = tensors[:inputs], tensors[inputs:]
        ctx.save_for_backward(*own)
        out = torch.empty_like(own[0])
        with call.precision():
            for index, part in enumerate(rounds(call.slices(), out)):
                out[part] = call.run(index, part, *(tensor.detach()[part] for tensor in own))
        call.done()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call, inputs = ctx.call, ctx.saved_tensors
        grad_inputs = [torch.empty_like(tensor) for tensor in inputs]
        sums: list[Tensor] = []
        slices = call.slices()
        for index, part in enumerate(rounds(slices, grad_output)):
            own = [tensor[part].detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad(), call.precision():
                # a view: torch's counters of memory and FLOPs hook a module's input, which cannot be a leaf here
                out = call.run(index, part, *(tensor.view_as(tensor) for tensor in own))
            gradients = list(torch.autograd.grad(out, [*own, *ctx.parameters], grad_output[part]))
            for whole in grad_inputs:
                whole[part] = gradients.pop(0)
            del out, own
            if index == 0:  # the sum over slices is in float32 where gradients have 16 bits
                sums = [g if len(slices) == 1 else g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
            else:
                _add(gradients, sums)
            del gradients  # not kept through the next slice's passes
        call.done()
        totals = (total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True))
        return None, None, *grad_inputs, *totals


def _add(gradients: list[Tensor], sums: list[Tensor]) -> None:
    """Add gradients to their sums, some rows at a time: on a CPU those of 16 bits are converted first."""
    for total, gradient in zip(sums, gradients, strict=True):
        rows = max(1, ADDED * len(total) // total.numel()) if total.dtype != gradient.dtype else len(total)
        for part, more in zip(total.split(rows), gradient.split(rows), strict=True):
            part.add_(more)


def _cut(value: object, part: slice, length: int) -> Any:
    """Return the rows `part` of every tensor in nested tuples that has `length` rows, and of what has a way of its own.

    That is a method `rows`, which is given the part.
    """
    if isinstance(value, Tensor):
        return value[part] if value.shape[0] == length else value
    if hasattr(value, "rows"):
        return value.rows(part)
    if isinstance(value, tuple):
        pieces = [_cut(item, part, length) for item in value]
        return type(value)(*pieces) if hasattr(value, "_fields") else tuple(pieces)
    return value
