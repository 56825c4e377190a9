"""Activation checkpointing: which activations of a block are kept for the backward pass.

All of it is exact: what is not kept is computed again, with the same dropout.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from leanbert.errors import UserError
from leanbert.measure.torch_compat import OpOverload
from leanbert.memory.layer_major import run_in_slices

Keep = Literal["all", "products", "input"]

PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
"""Operations whose outputs cost most to compute again, by name: one is of a module that is imported where needed."""


class Checkpointable(nn.Module):
    """A block that owns the switches of its activations.

    `keep`: "all" activations; the outputs of matrix "products" (and of attention), the rest computed again; or the
    block's "input" only. `slice_rows`: rows of the batch that go through the block at a time, with the input
    only kept (layer-major execution); None: all rows.
    """

    keep: Keep = "all"
    slice_rows: int | None = None


def run_block(block: Any, hidden: Tensor, context: object, *more: Tensor) -> Tensor:
    """Return `block(hidden, context, *more)`, [B, S, D], keeping for its backward pass what the block's switches say.

    `block` is a `Checkpointable`; `more` are tensors that may need gradients too. Source: Chen et al. 2016, arXiv
    1604.06174, through `torch.utils.checkpoint`.
    """
    if not torch.is_grad_enabled():
        return block(hidden, context, *more)
    if block.slice_rows is not None:
        return run_in_slices(block, hidden, context, block.slice_rows, *more)
    if block.keep == "all":
        return block(hidden, context, *more)
    if block.keep == "input":
        return checkpoint(block, hidden, context, *more, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, hidden, context, *more, use_reentrant=False, context_fn=contexts)


def set_checkpointing(blocks: Iterable[nn.Module], keep: Keep, every: int = 1) -> int:
    """Set `keep` on every `every`-th of `blocks`, counted from the first; return how many were set.

    Raises:
        UserError: None was set.

    """
    chosen = [block for block in blocks if isinstance(block, Checkpointable)][::every]
    for block in chosen:
        block.keep = keep
    if not chosen:
        raise UserError("checkpointing: the model has no blocks. Leave the technique out.")
    return len(chosen)


def _policy(context: object, operation: object, *_: object, **__: object) -> CheckpointPolicy:
    kept = isinstance(operation, OpOverload) and operation.name() in PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
