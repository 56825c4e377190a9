"""The decoder: an encoder's blocks that see only what came before, and look at the encoder's output in between.

Shapes: B batch, T target tokens (of which P are in a cache already), S source tokens, D hidden, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanbert.memory.checkpointing import run_block
from leanbert.models.attention import AttentionContext, CrossAttention, SelfAttention, make_angles
from leanbert.models.config import ResolvedConfig
from leanbert.models.embeddings import Embeddings
from leanbert.models.encoder import FeedForward, ResidualBlock, Stack, make_norm
from leanbert.models.kernels.attention import additive_mask, make_mask, same_document
from leanbert.models.packed_inputs import PackedInputs


class DecoderContext(NamedTuple):
    """What all blocks share in a forward pass; masks are 0 or -inf and added to the scores.

    `own.mask` is [B, 1, T, T] or `Documents`: causal, inside documents; `cross_mask` is [B, 1, T, S]: the source of the
    same document.
    """

    own: AttentionContext
    cross_mask: Tensor


class DecoderBlock(ResidualBlock):
    """Self-attention, attention to the source, feed-forward; it is the first of the decoder's if `first`."""

    def __init__(self, config: ResolvedConfig, layer: int, first: bool) -> None:
        super().__init__(config, layer)
        self.attention = SelfAttention(config)
        self.attention_norm = nn.Identity() if self.pre_norm and first else make_norm(config)
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
        hidden = self.add(hidden, self.attention_norm, attention)
        hidden = self.add(hidden, self.cross_attention_norm, cross)
        return self.add(hidden, self.feed_forward_norm, self.feed_forward)


class Decoder(Stack):
    """Target ids and the encoder's output to hidden states: [B, T], [B, S, D] -> [B, T, D].

    Args:
        config: Architecture of the encoder; attention is global in all blocks.
        num_layers: Blocks.
        vocab_size: Tokens of an embedding of its own; None: the encoder's is used.

    """

    def __init__(self, config: ResolvedConfig, num_layers: int, vocab_size: int | None = None) -> None:
        own = config if vocab_size is None else replace(config, vocab_size=vocab_size)
        embeddings = Embeddings(own, tokens=vocab_size is not None)
        blocks = (DecoderBlock(config, config.num_layers + layer, first=layer == 0) for layer in range(num_layers))
        super().__init__(config, embeddings, blocks)

    def forward(self, inputs: PackedInputs, embedding: Tensor, memory: Tensor, source_documents: Tensor) -> Tensor:
        """Decode rows [B, T] with the token embedding [R, D], looking at `memory` [B, S, D].

        A target sees the targets before it and the source of the same document; `source_documents` is int64 [B, S].
        Raises `UserError` if T exceeds the model's positions.
        """
        self.config.check_length(inputs.input_ids.shape[1])
        with self.storage() if torch.is_grad_enabled() else nullcontext():
            hidden = self.note(self.embeddings(inputs, embedding))
            context = self.make_context(inputs, source_documents, hidden)
            for block in self.blocks:
                hidden = self.note(run_block(block, hidden, context, memory))
            return self.final_norm(hidden)

    def make_context(self, inputs: PackedInputs, source_documents: Tensor, like: Tensor) -> DecoderContext:
        """Return masks and angles of `inputs` for products with `like`."""
        rate = self.config.attention_dropout if self.training else 0.0
        own = make_mask(inputs, like, self.config.head_size, rate, window=(-1, 0))  # causal
        cross = same_document(inputs.document_ids, source_documents)
        # padding of the target looks at the row's first source, whatever that is: nobody looks at it
        first = torch.arange(source_documents.shape[1], device=like.device) == 0
        cross = cross | (~cross.any(-1, keepdim=True) & first)
        own_context = AttentionContext(own, make_angles(self.config, inputs.position_ids, like))
        return DecoderContext(own_context, additive_mask(cross, like))
