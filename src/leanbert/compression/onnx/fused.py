"""Parts of a model as onnxruntime computes them fastest, for rows of one document each.

Shapes: B batch, S tokens, T target tokens, P target tokens before them, D hidden, H heads, d head size, I neurons.
"""

from __future__ import annotations

from itertools import zip_longest
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.compression.low_rank import LowRankLinear
from leanbert.models.attention import CrossAttention, SelfAttention, rotary_angle
from leanbert.models.base import EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.encoder import Encoder, FeedForward
from leanbert.models.kernels.attention import visible
from leanbert.models.packed_inputs import PackedInputs


class Parts(nn.Module):
    """A linear layer, maybe of low rank, whose outputs come in `count` parts: as a `Split` they would be copied."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        wide: Any = layer
        self.down = wide.down if isinstance(layer, LowRankLinear) else None
        self.weights = nn.ParameterList((wide.weight if self.down is None else wide.up).chunk(count))
        self.biases = nn.ParameterList([] if wide.bias is None else wide.bias.chunk(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Multiply [..., n] with each part of the matrix: [..., m / count] each."""
        if self.down is not None:
            x = F.linear(x, self.down)
        return [F.linear(x, weight, bias) for weight, bias in zip_longest(self.weights, self.biases)]


Turns = tuple[Tensor, Tensor] | None
"""Cosine and sine by which queries and keys turn, [B, S, d/2] each; None where positions enter otherwise."""


class GraphContext(NamedTuple):
    """What blocks of one kind share: `mask` is bool and can be broadcast to [B, H, S, P + S]."""

    mask: Tensor
    turns: Turns


def make_turns(config: ResolvedConfig, position: Tensor, rows: int, local: bool = False) -> Turns:
    """Return the turns [B, S, d/2] at the positions int64 [S], the same for all rows."""
    if config.position != "rotary":
        return None
    angle = rotary_angle(position[None], config.head_size, config.theta(local))  # [1, S, d/2]
    return angle.cos().expand(rows, -1, -1), angle.sin().expand(rows, -1, -1)


def make_context(encoder: Encoder, inputs: PackedInputs, like: Tensor, local: bool = False) -> GraphContext:
    """Return what `Encoder.make_context` does, as `FusedAttention` takes it."""
    config, (rows, length) = encoder.config, inputs.input_ids.shape
    turns = make_turns(config, torch.arange(length, device=like.device), rows, local)
    return GraphContext(visible(inputs, config.window(local)), turns)


class FusedAttention(nn.Module):
    """Self-attention whose heads stay where the projections leave them: [B, S, D] -> [B, S, D].

    Rotation and attention are one operator each, where onnxruntime would take some twenty passes over memory.
    """

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.qkv, self.output, self.num_heads = Parts(attention.qkv, 3), attention.output, attention.num_heads

    def forward(self, hidden: Tensor, context: GraphContext) -> Tensor:
        """Attend inside what `context.mask` allows."""
        return self.extend(hidden, context)[0]

    def extend(self, hidden: Tensor, context: GraphContext, *past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attend to `past` keys and values [B, H, P, d] too; return these with the own ones, [B, H, P + S, d]."""
        heads = self.num_heads
        query, key, value = self.qkv(hidden)  # [B, S, H * d] each
        if context.turns is not None:
            query = torch.onnx.ops.rotary_embedding(query, *context.turns, num_heads=heads)
            key = torch.onnx.ops.rotary_embedding(key, *context.turns, num_heads=heads)
        mixed, *present, _ = torch.onnx.ops.attention(
            query, key, value, context.mask, *past, q_num_heads=heads, kv_num_heads=heads
        )
        return self.output(mixed), *present


class FusedCrossAttention(nn.Module):
    """Attention to the source in the same way: [B, T, D] to [B, S, D] -> [B, T, D]."""

    def __init__(self, attention: CrossAttention) -> None:
        super().__init__()
        self.query, self.key_value = attention.query, Parts(attention.key_value, 2)
        self.output, self.num_heads = attention.output, attention.num_heads

    def project(self, memory: Tensor) -> list[Tensor]:
        """Return the keys and values of `memory` [B, S, D], [B, S, H * d] each."""
        return self.key_value(memory)

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend inside what `mask` allows; `key` and `value` come from `project`."""
        heads = self.num_heads
        mixed, *_ = torch.onnx.ops.attention(
            self.query(hidden), key, value, mask, q_num_heads=heads, kv_num_heads=heads
        )
        return self.output(mixed)


class GatedFeedForward(nn.Module):
    """A gated feed-forward of two matrices where there was one: [B, S, D] -> [B, S, D]."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.input, self.output, self.activate = Parts(plain.input, 2), plain.output, plain.activate

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen, activate, narrow."""
        active, linear = self.input(hidden)  # [B, S, I] each
        return self.output(self.activate(active) * linear)


def fuse(model: EncoderModel) -> None:
    """Let a model compute in these ways, in place; it then takes rows of one document only."""
    model.encoder.make_context = MethodType(make_context, model.encoder)  # type: ignore[method-assign]
    block: Any
    for block in model.blocks:
        block.attention = FusedAttention(block.attention)
        if hasattr(block, "cross_attention"):
            block.cross_attention = FusedCrossAttention(block.cross_attention)
        if block.feed_forward.gated:
            block.feed_forward = GatedFeedForward(block.feed_forward)
