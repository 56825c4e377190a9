"""Self-attention: fused projections, rotary positions, documents that do not see each other.

Shapes: B batch, S sequence, D hidden, H heads, d head size (D = H * d).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig


class AttentionContext(NamedTuple):
    """What all blocks of one kind (global or local) share in a forward.

    `mask` [B or 1, 1, S, S] is added to the scores: 0 or -inf, in the dtype of the scores.
    `cosine` and `sine` [B or 1, S, 1, 1, d/2] are float32 angles of the rotary embedding.
    """

    mask: Tensor | None
    cosine: Tensor | None
    sine: Tensor | None


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


def rotary_angles(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, float32 [B or 1, S, 1, 1, d/2], for int64 positions [B or 1, S].

    Su et al. 2021, arXiv 2104.09864. The frequencies are no buffer, for `module.to(bfloat16)`
    would round them.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angle = position_ids[:, :, None, None, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of the last dimension of `x` [B, S, n, H, d]; dtype stays."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Softmax attention of [B, H, S, d] tensors, with dropout of the probabilities at `rate`."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself, [B, S, D] -> [B, S, D]."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Attend inside what `context.mask` allows."""
        rows, length, width = hidden.shape
        fused = self.qkv(hidden).view(rows, length, 3, self.num_heads, -1)  # [B, S, 3, H, d]
        query_key, value = fused.split((2, 1), dim=2)
        if context.cosine is not None and context.sine is not None:
            query_key = rotate(query_key, context.cosine, context.sine)
        query, key = query_key.transpose(1, 3).unbind(2)  # [B, H, S, d] each
        rate = self.dropout if self.training else 0.0
        mixed = attend(query, key, value.squeeze(2).transpose(1, 2), context.mask, rate)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, width))
