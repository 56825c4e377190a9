"""Floating-point operations of matrix products and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


def _product_flops(first: Tensor, second: Tensor, *_: object, **__: object) -> int:
    return 2 * first.numel() * second.shape[-1]


def _sum_and_product_flops(_: Tensor, first: Tensor, second: Tensor, *__: object, **___: object) -> int:
    return _product_flops(first, second)


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,  # whose counts of products take as long as all else in a trace, and only accelerators' attention
    **dict.fromkeys((aten.mm, aten.bmm), _product_flops),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _sum_and_product_flops),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Counts the floating-point operations of a call, by operation."""
