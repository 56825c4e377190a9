"""Attention of a sequence to itself and to another one: fused projections, rotary positions.

Shapes: B batch, S sequence, T target, D hidden, H heads, d head size (H * d = D, unless heads were removed).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig
from leanbert.models.kernels.attention import Mask, attend, product_dtype
from leanbert.models.linear import Linear


class RotaryAngles(NamedTuple):
    """Cosine and sine by which queries and keys turn, [B or 1, S, 1, 1, d]; half of the sine is negated."""

    cosine: Tensor
    signed_sine: Tensor


class AttentionContext(NamedTuple):
    """What all blocks of one kind (global or local) share in a forward, in the dtypes of the scores.

    `mask` [B or 1, 1, S, S], 0 or -inf, is added to the scores; of `Documents` each sees itself; None: all see all.
    """

    mask: Mask
    angles: RotaryAngles | None


def make_angles(config: ResolvedConfig, position_ids: Tensor, like: Tensor, local: bool = False) -> RotaryAngles | None:
    """Return the angles of int64 `position_ids` [B or 1, S] in the dtype of products with `like`.

    None where positions enter otherwise. `local`: for local attention. Computed in float32. Su et al. 2021, arXiv
    2104.09864.
    """
    if config.position != "rotary":
        return None
    dtype = product_dtype(like)
    angle = rotary_angle(position_ids, config.head_size, config.theta(local))[:, :, None, None]  # [B, S, 1, 1, d/2]
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    return RotaryAngles(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotary_angle(position_ids: Tensor, head_size: int, theta: float) -> Tensor:
    """Return the angle of each pair of numbers of a head at int64 `position_ids` [B, S]: float32 [B, S, d/2].

    The frequencies are no buffer, for `module.to(bfloat16)` would round them.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    return position_ids[:, :, None].float() * theta**-exponent


def rotate(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Turn the pairs (i, i + d/2) of the last dimension of `x` [B, S, n, H, d], in the dtype of `x`."""
    first, second = x.chunk(2, dim=-1)
    # With the sign inside the sine this takes three passes; mixed dtypes would make each of them far slower.
    return torch.addcmul(x * angles.cosine, torch.cat((second, first), dim=-1), angles.signed_sine)


class Attention(nn.Module):
    """What attention to the same sequence and to another one share.

    `stacked`: the projections to heads, and how many matrices each stacks; values come last.
    """

    stacked: ClassVar[dict[str, int]]

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.attention_dropout
        inner = config.num_heads * config.head_size
        for name, matrices in self.stacked.items():
            self.add_module(name, Linear(config.hidden_size, matrices * inner, bias=config.bias))
        self.output = Linear(inner, config.hidden_size, bias=config.bias)

    def projections(self) -> list[tuple[Linear, int]]:
        """Return the layers whose rows belong to heads, and how many matrices each stacks; values come last."""
        return [(getattr(self, name), matrices) for name, matrices in self.stacked.items()]

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """Attend with queries [B, H, T, d] to keys and values [B, H, S, d] inside what `mask` allows: [B, T, D]."""
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).flatten(2))  # from [B, T, H * d]


class SelfAttention(Attention):
    """Multi-head attention of a sequence to itself, [B, S, D] -> [B, S, D]."""

    qkv: Linear
    stacked: ClassVar[dict[str, int]] = {"qkv": 3}

    def project(self, hidden: Tensor, angles: RotaryAngles | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of `hidden` [B, S, D], [B, H, S, d] each."""
        fused = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))  # [B, S, 3, H, d]
        query_key, value = fused.split((2, 1), dim=2)
        if angles is not None:
            query_key = rotate(query_key, angles)
        query, key = query_key.transpose(1, 3).unbind(2)
        return query, key, value.squeeze(2).transpose(1, 2)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Attend inside what `context.mask` allows."""
        return self.mix(*self.project(hidden, context.angles), context.mask)


class CrossAttention(Attention):
    """Attention of the target to the encoder's output: [B, T, D] to [B, S, D] -> [B, T, D]; without positions."""

    query: Linear
    key_value: Linear
    stacked: ClassVar[dict[str, int]] = {"query": 1, "key_value": 2}

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of `memory` [B, S, D], [B, H, S, d] each."""
        fused = self.key_value(memory).unflatten(-1, (2, self.num_heads, -1))  # [B, S, 2, H, d]
        key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend inside what `mask` allows; `key` and `value` come from `project`."""
        query = self.query(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, d]
        return self.mix(query, key, value, mask)
