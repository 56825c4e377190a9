"""The decoder: an encoder's blocks that see only what came before, and look at the encoder's output in between.

Shapes: B batch, T target tokens (of which P are in a cache already), S source tokens, D hidden, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanbert.memory.checkpointing import Checkpointable, run_block
from leanbert.models.attention import AttentionContext, SelfAttention, attend, product_dtype, rotary_angles
from leanbert.models.config import ResolvedConfig
from leanbert.models.dropout import dropout
from leanbert.models.embeddings import Embeddings
from leanbert.models.encoder import FeedForward, make_norm


class DecoderContext(NamedTuple):
    """What all blocks share in a forward pass; masks are 0 or -inf and added to the scores.

    `own.mask` is [B, 1, T, T]: causal, inside documents; `cross_mask` [B, 1, T, S]: the source of the same document.
    """

    own: AttentionContext
    cross_mask: Tensor


class CrossAttention(nn.Module):
    """Attention of the target to the encoder's output: [B, T, D] to [B, S, D] -> [B, T, D]; without positions."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = config.num_heads, config.attention_dropout
        inner = config.num_heads * config.head_size
        self.query = nn.Linear(config.hidden_size, inner, bias=config.bias)
        self.key_value = nn.Linear(config.hidden_size, 2 * inner, bias=config.bias)
        self.output = nn.Linear(inner, config.hidden_size, bias=config.bias)

    def projections(self) -> list[tuple[nn.Linear, int]]:
        """Return the layers whose rows belong to heads, and how many matrices each stacks; values come last."""
        return [(self.query, 1), (self.key_value, 2)]

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of `memory` [B, S, D], [B, H, S, d] each."""
        fused = self.key_value(memory).unflatten(-1, (2, self.num_heads, -1))  # [B, S, 2, H, d]
        key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        return key, value

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Attend inside what `mask` allows; `key` and `value` are those of `project`."""
        query = self.query(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, d]
        mixed = attend(query, key, value, mask, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).flatten(2))  # from [B, T, H * d]


class DecoderBlock(Checkpointable):
    """Self-attention, attention to the source, feed-forward, each added to the residual stream."""

    def __init__(self, config: ResolvedConfig, layer: int, number: int) -> None:
        super().__init__()
        self.layer = number  # among all blocks of the model: dropout differs by it
        self.pre_norm, self.dropout = config.norm_position == "pre", config.dropout
        self.attention = SelfAttention(config)
        self.attention_norm = nn.Identity() if self.pre_norm and layer == 0 else make_norm(config)
        self.cross_attention = CrossAttention(config)
        self.cross_attention_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config)

    def forward(self, hidden: Tensor, context: DecoderContext, memory: Tensor) -> Tensor:
        """Run one block on the whole target `hidden` [B, T, D] and source `memory` [B, S, D]."""
        key, value = self.cross_attention.project(memory)
        return self.run(
            hidden,
            lambda x: self.attention(x, context.own),
            lambda x: self.cross_attention(x, key, value, context.cross_mask),
        )

    def run(self, hidden: Tensor, attention: Callable[[Tensor], Tensor], cross: Callable[[Tensor], Tensor]) -> Tensor:
        """Run one block with given ways of attention to the target and to the source."""
        if self.pre_norm:
            hidden = hidden + self._drop(attention(self.attention_norm(hidden)))
            hidden = hidden + self._drop(cross(self.cross_attention_norm(hidden)))
            return hidden + self._drop(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.attention_norm(hidden + self._drop(attention(hidden)))
        hidden = self.cross_attention_norm(hidden + self._drop(cross(hidden)))
        return self.feed_forward_norm(hidden + self._drop(self.feed_forward(hidden)))

    def _drop(self, branch: Tensor) -> Tensor:
        return dropout(branch, self.dropout, self.training)


class Decoder(nn.Module):
    """Target ids and the encoder's output to hidden states: [B, T], [B, S, D] -> [B, T, D].

    Args:
        config: Architecture, that of the encoder; attention is global in all blocks.
        num_layers: Blocks.
        vocab_size: Tokens of an embedding of its own; None: that of the encoder is used.

    """

    def __init__(self, config: ResolvedConfig, num_layers: int, vocab_size: int | None = None) -> None:
        super().__init__()
        self.config = config
        own = config if vocab_size is None else config.with_vocabulary(vocab_size)
        self.embeddings = Embeddings(own, tokens=vocab_size is not None)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, layer, config.num_layers + layer) for layer in range(num_layers)
        )
        self.final_norm = make_norm(config) if config.norm_position == "pre" else None
        self.storage: Callable[[], AbstractContextManager[Any]] = nullcontext  # of saved activations

    def forward(
        self,
        ids: Tensor,
        tokens: Tensor,
        memory: Tensor,
        *,
        position_ids: Tensor,
        document_ids: Tensor,
        memory_document_ids: Tensor,
    ) -> Tensor:
        """Decode int64 ids [B, T] with the token embeddings `tokens` [R, D], looking at `memory` [B, S, D].

        `position_ids` and `document_ids` are int64 [B, T], `memory_document_ids` [B, S]: a target sees the targets
        before it and the source of the same document.
        Raises `UserError` if T exceeds the model's positions.
        """
        self.config.check_length(ids.shape[1])
        with self.storage() if torch.is_grad_enabled() else nullcontext():
            hidden = self.embeddings(ids, position_ids, None, tokens)
            context = self._context(hidden, position_ids, document_ids, memory_document_ids)
            for block in self.blocks:
                hidden = run_block(block, hidden, context, memory)
            return hidden if self.final_norm is None else self.final_norm(hidden)

    def _context(self, hidden: Tensor, position_ids: Tensor, documents: Tensor, sources: Tensor) -> DecoderContext:
        place = torch.arange(hidden.shape[1], device=hidden.device)
        causal = (place[:, None] >= place[None, :])[None, None]  # [1, 1, T, T]
        own = causal & (documents[:, None, :, None] == documents[:, None, None, :])
        cross = documents[:, None, :, None] == sources[:, None, None, :]  # [B, 1, T, S]
        # padding of the target looks at the row's first source, whatever that is: nobody looks at it
        nothing = (~cross.any(-1, keepdim=True)) & (torch.arange(sources.shape[1], device=hidden.device) == 0)
        own_context = AttentionContext(additive(own, hidden), self.angles(position_ids, hidden))
        return DecoderContext(own_context, additive(cross | nothing, hidden))

    def angles(self, position_ids: Tensor, hidden: Tensor) -> Any:
        """Return the rotary angles of the positions, None where positions enter otherwise."""
        if self.config.position != "rotary":
            return None
        return rotary_angles(position_ids, self.config.head_size, self.config.rotary_theta, product_dtype(hidden))


def additive(allowed: Tensor, like: Tensor) -> Tensor:
    """Return 0 where `allowed` (bool) and -inf elsewhere, in the dtype of matrix products with `like`."""
    mask = torch.zeros(allowed.shape, dtype=product_dtype(like), device=like.device)
    return mask.masked_fill_(~allowed, float("-inf"))
