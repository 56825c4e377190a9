"""Attention: one function for all that attend, which chooses the kernel; and the masks that it takes.

Shapes: B batch, T queries, S keys, H heads, d head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanbert.measure.target import stands_in, target_type
from leanbert.models.dropout import dropout
from leanbert.models.packed_inputs import Documents, PackedInputs

Mask = Tensor | Documents | None

FEWEST_QUERIES, MOST_QUERIES = 16, 512
"""Queries with which matrix products in 16 bits beat the fused kernel on a CPU: fewer leave the units for them idle, as
in decoding with a cache (0.3 against 3 ms); with more it counts that the T x S scores are kept for the backward."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, rate: float = 0.0) -> Tensor:
    """Softmax attention of queries [B, H, T, d] to keys and values [B, H, S, d]: [B, H, T, d].

    A `mask` [B or 1, 1, T or 1, S], see `additive_mask`, is added to the scores; with `Documents`, see `make_mask`,
    each attends to itself; None: all see all. Probabilities are dropped at `rate`.
    """
    if isinstance(mask, Documents):
        return attend_packed(query, key, value, mask)
    if prefers_products(query, rate):
        return products(query, key, value, mask, rate)
    if mask is not None and stands_in(query) and target_type(query) == "cuda":  # what is called there for a mask
        mask = mask.expand(*query.shape[:3], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True, rate)[0]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    """Attend as `attend` does, [B, H, S, d] each, inside documents and their window."""
    from torch.nn.attention.varlen import varlen_attn  # only here: this takes seconds

    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))  # [B * S, H, d], views
    ends, longest = documents.cu_seqlens, documents.max_seqlen
    mixed: Any = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=documents.window)
    return mixed.unflatten(0, (len(query), -1)).transpose(1, 2)


def make_mask(
    inputs: PackedInputs, like: Tensor, head_size: int, rate: float, window: tuple[int, int] = (-1, -1)
) -> Tensor | Documents:
    """Return the mask of packed rows for `attend`: a token sees those of its document that are in its `window`.

    Args:
        inputs: Rows [B, S].
        like: A tensor whose products have the dtype of queries and keys.
        head_size: d.
        rate: At which probabilities are dropped.
        window: Tokens seen to the left and to the right; -1: all.

    Returns:
        `Documents` where the device has a kernel for them; else a mask [B, 1, S, S].

    """
    if inputs.documents is not None and takes_documents(like, head_size, rate):
        return inputs.documents._replace(window=window)
    return additive_mask(visible(inputs, window), like)


def visible(inputs: PackedInputs, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """Return which tokens see which, those of their document in their `window`: bool [B, 1, S, S]."""
    allowed = same_document(inputs.document_ids, inputs.document_ids)
    if window != (-1, -1):
        position = torch.arange(allowed.shape[-1], device=allowed.device)
        distance = position[None, :] - position[:, None]  # [S, S]
        for far, bound in ((-distance, window[0]), (distance, window[1])):
            allowed = allowed if bound < 0 else allowed & (far <= bound)
    return allowed


def takes_documents(like: Tensor, head_size: int, rate: float) -> bool:
    """Whether attention with products like those of `like` can do without a mask: flash attention of packed rows.

    `torch.nn.attention.varlen` has it on CUDA from Ampere on, in 16 bits, without dropout.
    """
    few_bits = product_dtype(like) in (torch.bfloat16, torch.float16)
    fits = few_bits and rate == 0.0 and head_size % 8 == 0 and head_size <= 256
    return fits and target_type(like) == "cuda" and (stands_in(like) or _is_ampere(like.device))


@cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def prefers_products(query: Tensor, rate: float) -> bool:
    """Whether attention with `query` [B, H, T, d] is better done by matrix products than by the fused kernel.

    On a CPU the fused kernel has no dropout (torch then falls back to slower products of its own), and uses the units
    for 16-bit products poorly: 29 ms against 7 ms, forward and backward, for 32 x 4 x 128 x 64.
    """
    if target_type(query) != "cpu":
        return False
    few_bits = query.dtype in (torch.bfloat16, torch.float16)
    return rate > 0.0 or (few_bits and FEWEST_QUERIES <= query.shape[-2] <= MOST_QUERIES)


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Attend as `attend` does, by plain matrix products."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B, H, T, S]
    if mask is not None:
        scores = scores.add_(mask)
    return dropout(scores.softmax(dim=-1), rate, training=rate > 0.0) @ value


def same_document(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """Return where the documents int64 [B, T] and [B, S] are equal: bool [B, 1, T, S]."""
    return query_documents[:, None, :, None] == key_documents[:, None, None, :]


def additive_mask(allowed: Tensor, like: Tensor) -> Tensor:
    """Return 0 where `allowed` (bool) and -inf elsewhere, in the dtype and on the device of products with `like`."""
    mask = torch.zeros(allowed.shape, dtype=product_dtype(like), device=like.device)
    return mask.masked_fill_(~allowed, float("-inf"))


def product_dtype(like: Tensor) -> torch.dtype:
    """Dtype in which a matrix product with `like` runs here: autocast's, or its own."""
    device_type = like.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else like.dtype
