"""Floating-point operations of matrix products and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from leanbert.measure.torch_compat import OpOverload

aten = torch.ops.aten


def _product_flops(first: Tensor, second: Tensor, *_: object, **__: object) -> int:
    return 2 * first.numel() * second.shape[-1]


def _sum_and_product_flops(_: Tensor, first: Tensor, second: Tensor, *__: object, **___: object) -> int:
    return _product_flops(first, second)


def _packed_flops(products: int, longest: int) -> Callable[..., int]:
    """Return a count of attention of packed documents [T, H, d]: as if each token saw as many as the longest one has.

    That is argument number `longest`; nothing is read back.
    """
    return lambda *args, **_: products * 2 * args[0].numel() * args[longest]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,  # whose counts of products take as long as all else in a trace, and not of a CPU's attention
    **dict.fromkeys((aten.mm, aten.bmm), _product_flops),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _sum_and_product_flops),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Counts the floating-point operations of a call, by operation."""

LOADED_LATE: dict[str, Callable[..., int]] = {
    "torch_attn::_varlen_attn": _packed_flops(products=2, longest=6),
    "torch_attn::_varlen_attn_backward": _packed_flops(products=5, longest=9),
}
"""The same of operations of `torch.nn.attention.varlen`, by name: their module takes seconds to import."""


def counter_of(operation: OpOverload) -> Callable[..., int] | None:
    """Return what counts the operations of a call; None for one that has none worth counting."""
    return FLOPS.get(operation._overloadpacket) or LOADED_LATE.get(operation._schema.name)
