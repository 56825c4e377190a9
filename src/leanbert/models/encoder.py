"""The encoder: one class whose settings make it original BERT or the modern one.

Shapes: B batch, S sequence, D hidden, I intermediate, d head size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.memory.checkpointing import Checkpointable, run_block
from leanbert.models.attention import AttentionContext, SelfAttention, additive_mask, product_dtype, rotary_angles
from leanbert.models.config import ResolvedConfig
from leanbert.models.dropout import dropout
from leanbert.models.embeddings import Embeddings


def make_norm(config: ResolvedConfig) -> nn.LayerNorm:
    """LayerNorm over D as the configuration wants it."""
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)


class FeedForward(nn.Module):
    """Position-wise network, plain or gated (Shazeer 2020, arXiv 2002.05202): [B, S, D] -> [B, S, D]."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.activate = F.silu if config.activation == "swiglu" else F.gelu
        wide = config.intermediate_size * (2 if config.gated else 1)
        self.input = nn.Linear(config.hidden_size, wide, bias=config.bias)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen, activate, narrow."""
        inner = self.input(hidden)  # [B, S, I], or [B, S, 2 I] when gated
        if self.gated:
            active, linear = inner.chunk(2, dim=-1)
            return self.output(self.activate(active) * linear)
        return self.output(self.activate(inner))


class Block(Checkpointable):
    """Attention and feed-forward, each added to the residual stream: [B, S, D] -> [B, S, D].

    With pre-norm the first block has no attention norm, for embeddings come normalised (as in ModernBERT).
    """

    def __init__(self, config: ResolvedConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.attention = SelfAttention(config)
        self.attention_norm = nn.Identity() if self.pre_norm and layer == 0 else make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Run one block; `context` is that of global or of local attention."""
        if self.pre_norm:
            hidden = hidden + self._drop(self.attention(self.attention_norm(hidden), context))
            return hidden + self._drop(self.feed_forward(self.feed_forward_norm(hidden)))
        hidden = self.attention_norm(hidden + self._drop(self.attention(hidden, context)))
        return self.feed_forward_norm(hidden + self._drop(self.feed_forward(hidden)))

    def _drop(self, branch: Tensor) -> Tensor:
        return dropout(branch, self.dropout, self.training)


class Encoder(nn.Module):
    """Token ids to hidden states, [B, S] -> [B, S, D]."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_position == "pre" else None
        self.storage: Callable[[], AbstractContextManager[Any]] = nullcontext  # of saved activations

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Encode int64 ids [B, S]; the other arguments are int64 [B, S] too.

        Attention stays inside equal `document_ids` (None: the whole row is one document; padding: -1, which
        sees only itself). `position_ids` default to 0 .. S-1, `segment_ids` to 0.
        Raises `UserError` if S exceeds the model's positions.
        """
        length = input_ids.shape[1]
        self.config.check_length(length)
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]  # [1, S]
        with self.storage() if torch.is_grad_enabled() else nullcontext():
            hidden = self.embeddings(input_ids, position_ids, segment_ids)
            local_layers = [self.config.is_local(layer) for layer in range(self.config.num_layers)]
            contexts = {local: self._context(local, position_ids, document_ids, hidden) for local in set(local_layers)}
            for block, local in zip(self.blocks, local_layers, strict=True):
                hidden = run_block(block, hidden, contexts[local])
            return hidden if self.final_norm is None else self.final_norm(hidden)

    def _context(
        self, local: bool, position_ids: Tensor, document_ids: Tensor | None, hidden: Tensor
    ) -> AttentionContext:
        config = self.config
        window = config.local_window if local else 0
        mask = additive_mask(document_ids, hidden.shape[1], window, hidden)
        if config.position != "rotary":
            return AttentionContext(mask, None)
        theta = config.local_rotary_theta if local else config.rotary_theta
        angles = rotary_angles(position_ids, config.head_size, theta, product_dtype(hidden))
        return AttentionContext(mask, angles)
