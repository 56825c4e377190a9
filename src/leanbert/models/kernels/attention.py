"""Attention: one function for all that attend, which chooses the kernel; and the masks that it takes.

Shapes: B batch, T queries, S keys, H heads, d head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanbert.models.dropout import dropout

FEWEST_QUERIES, MOST_QUERIES = 16, 512
"""Queries with which matrix products in 16 bits beat the fused kernel on a CPU: fewer leave the units for them idle, as
in decoding with a cache (0.3 against 3 ms); with more it counts that the T x S scores are kept for the backward."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float = 0.0) -> Tensor:
    """Softmax attention of queries [B, H, T, d] to keys and values [B, H, S, d]: [B, H, T, d].

    `mask` [B or 1, 1, T or 1, S], see `additive`, is added to the scores; None: all see all. Probabilities are dropped
    at `rate`.
    """
    if prefers_products(query, rate):
        return products(query, key, value, mask, rate)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)


def prefers_products(query: Tensor, rate: float) -> bool:
    """Whether attention with `query` [B, H, T, d] is better done by matrix products than by the fused kernel.

    On a CPU the fused kernel has no dropout (torch then falls back to slower products of its own), and uses the units
    for 16-bit products poorly: 29 ms against 7 ms, forward and backward, for 32 x 4 x 128 x 64.
    """
    if query.device.type != "cpu":
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


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """Return 0 where `allowed` (bool) and -inf elsewhere, in the dtype and on the device of products with `like`."""
    mask = torch.zeros(allowed.shape, dtype=product_dtype(like), device=like.device)
    return mask.masked_fill_(~allowed, float("-inf"))


def product_dtype(like: Tensor) -> torch.dtype:
    """Dtype in which a matrix product with `like` runs here: autocast's, or its own."""
    device_type = like.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else like.dtype
