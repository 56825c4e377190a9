"""Self-attention: fused projections, rotary positions, documents that do not see each other.

Shapes: B batch, S sequence, D hidden, H heads, d head size (H * d = D, unless heads were removed).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig
from leanbert.models.dropout import dropout

LONGEST_PRODUCT = 512
"""Tokens up to which a row's S x S scores are kept for the backward, where that is faster."""


class RotaryAngles(NamedTuple):
    """Cosine and sine by which queries and keys turn, [B or 1, S, 1, 1, d]; half of the sine is negated."""

    cosine: Tensor
    signed_sine: Tensor


class AttentionContext(NamedTuple):
    """What all blocks of one kind (global or local) share in a forward; dtypes are those of the scores.

    `mask` [B or 1, 1, S, S], 0 or -inf, is added to the scores; None: all see all.
    """

    mask: Tensor | None
    angles: RotaryAngles | None


def additive_mask(document_ids: Tensor | None, length: int, window: int, like: Tensor) -> Tensor | None:
    """Return 0 where a position may look and -inf elsewhere, [B or 1, 1, S, S]; None if all may see all.

    `document_ids` is int64 [B, S] (None: one document a row); `window` > 0 also limits the distance to
    `window // 2`. Device and dtype are those in which `like` takes part in matrix products.
    """
    allowed = None
    if document_ids is not None:
        allowed = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # [B, 1, S, S]
    if window > 0:
        place = torch.arange(length, device=like.device)
        near = (place[:, None] - place[None, :]).abs() <= window // 2  # [S, S]
        allowed = near[None, None] if allowed is None else allowed & near
    if allowed is None:
        return None
    mask = torch.zeros(allowed.shape, dtype=product_dtype(like), device=like.device)
    return mask.masked_fill_(~allowed, float("-inf"))


def product_dtype(like: Tensor) -> torch.dtype:
    """Dtype in which a matrix product with `like` runs here: autocast's, or its own."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def rotary_angles(position_ids: Tensor, head_size: int, theta: float, dtype: torch.dtype) -> RotaryAngles:
    """Return the angles of int64 `position_ids` [B or 1, S]; computed in float32, returned in `dtype`.

    Su et al. 2021, arXiv 2104.09864. The frequencies are no buffer, for `module.to(bfloat16)` would round them.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angle = position_ids[:, :, None, None, None].float() * theta**-exponent  # [B, S, 1, 1, d/2]
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    return RotaryAngles(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotate(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Turn the pairs (i, i + d/2) of the last dimension of `x` [B, S, n, H, d], in the dtype of `x`."""
    first, second = x.chunk(2, dim=-1)
    # With the sign inside the sine this takes three passes; mixed dtypes would make each of them far slower.
    return torch.addcmul(x * angles.cosine, torch.cat((second, first), dim=-1), angles.signed_sine)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Softmax attention of [B, H, S, d] tensors, with dropout of the probabilities at `rate`.

    Uses the fused kernel, except on CPUs where plain matrix products were measured to be faster.
    """
    if not prefers_products(query, rate):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # [B, H, S, S]
    if mask is not None:
        scores = scores.add_(mask)
    return dropout(scores.softmax(dim=-1), rate, training=rate > 0.0) @ value


def prefers_products(query: Tensor, rate: float) -> bool:
    """Whether attention with `query` [B, H, S, d] is better done by matrix products than by the fused kernel.

    On a CPU the fused kernel has no dropout (torch then falls back to slower products of its own), and uses the
    units for 16-bit products poorly: 29 ms against 7 ms, forward and backward, for 32 x 4 x 128 x 64. It saves
    the S x S scores, so it keeps the long rows.
    """
    if query.device.type != "cpu":
        return False
    short = query.shape[-2] <= LONGEST_PRODUCT and query.dtype in (torch.bfloat16, torch.float16)
    return rate > 0.0 or short


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, [B, S, D] -> [B, S, D]."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        inner = config.num_heads * config.head_size
        self.qkv = nn.Linear(config.hidden_size, 3 * inner, bias=config.bias)
        self.output = nn.Linear(inner, config.hidden_size, bias=config.bias)

    def projections(self) -> list[tuple[nn.Linear, int]]:
        """Return the layers whose rows belong to heads, and how many matrices each stacks; values come last."""
        return [(self.qkv, 3)]

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Attend inside what `context.mask` allows."""
        rows, length, _ = hidden.shape
        fused = self.qkv(hidden).view(rows, length, 3, self.num_heads, -1)  # [B, S, 3, H, d]
        query_key, value = fused.split((2, 1), dim=2)
        if context.angles is not None:
            query_key = rotate(query_key, context.angles)
        query, key = query_key.transpose(1, 3).unbind(2)  # [B, H, S, d] each
        rate = self.dropout if self.training else 0.0
        mixed = attend(query, key, value.squeeze(2).transpose(1, 2), context.mask, rate)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, -1))  # from [B, S, H * d]
