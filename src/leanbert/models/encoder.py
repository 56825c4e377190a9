"""The encoder: one class whose settings make it original BERT or the modern one.

Shapes: B batch, S sequence, D hidden, I intermediate, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.memory.checkpointing import Checkpointable, run_block
from leanbert.models.attention import AttentionContext, SelfAttention, make_angles
from leanbert.models.config import ResolvedConfig
from leanbert.models.dropout import dropout
from leanbert.models.embeddings import Embeddings
from leanbert.models.kernels.attention import make_mask
from leanbert.models.linear import Linear
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.unit import Unit


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
        self.input = Linear(config.hidden_size, wide, bias=config.bias)
        self.output = Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen, activate, narrow."""
        inner = self.input(hidden)  # [B, S, I], or [B, S, 2 I] when gated
        if self.gated:
            active, linear = inner.chunk(2, dim=-1)
            return self.output(self.activate(active) * linear)
        return self.output(self.activate(inner))


class ResidualBlock(Checkpointable, Unit):
    """A block whose parts are each added to the residual stream, with a norm before or after.

    `layer` is its number among all blocks of the model: dropout differs by it.
    """

    def __init__(self, config: ResolvedConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.pre_norm, self.dropout = config.norm_position == "pre", config.dropout

    def add(self, hidden: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add `branch` to the stream `hidden`; both [B, S, D]."""
        if self.pre_norm:
            return hidden + dropout(branch(norm(hidden)), self.dropout, self.training)
        return norm(hidden + dropout(branch(hidden), self.dropout, self.training))


class Block(ResidualBlock):
    """Attention and feed-forward: [B, S, D] -> [B, S, D].

    With pre-norm the first block has no attention norm, for embeddings come normalised (as in ModernBERT).
    """

    def __init__(self, config: ResolvedConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention = SelfAttention(config)
        self.attention_norm = nn.Identity() if self.pre_norm and layer == 0 else make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = make_norm(config)

    def forward(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """Run one block; `context` is of global or of local attention."""
        hidden = self.add(hidden, self.attention_norm, lambda x: self.attention(x, context))
        return self.add(hidden, self.feed_forward_norm, self.feed_forward)


class Stack(nn.Module):
    """What encoder and decoder have in common: embeddings, blocks and, with pre-norm, a norm after the last one."""

    def __init__(self, config: ResolvedConfig, embeddings: Embeddings, blocks: Iterable[ResidualBlock]) -> None:
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.storage: Callable[[], AbstractContextManager[Any]] = nullcontext  # of saved activations
        self.states: list[Tensor] | None = None  # of the embeddings and after each block, where somebody looks

    def note(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, which is added to `states` if somebody looks."""
        if self.states is not None:
            self.states.append(hidden)
        return hidden


class Encoder(Stack):
    """Token ids to hidden states, [B, S] -> [B, S, D]."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config, Embeddings(config), (Block(config, layer) for layer in range(config.num_layers)))

    def forward(self, inputs: PackedInputs) -> Tensor:
        """Encode rows. Raises `UserError` if S exceeds the model's positions."""
        self.config.check_length(inputs.input_ids.shape[1])
        with self.storage() if torch.is_grad_enabled() else nullcontext():
            hidden = self.note(self.embeddings(inputs))
            local_layers = [self.config.is_local(layer) for layer in range(self.config.num_layers)]
            contexts = {local: self.make_context(inputs, hidden, local) for local in set(local_layers)}
            for block, local in zip(self.blocks, local_layers, strict=True):
                hidden = self.note(run_block(block, hidden, contexts[local]))
            return self.final_norm(hidden)

    def make_context(self, inputs: PackedInputs, like: Tensor, local: bool = False) -> AttentionContext:
        """Return mask and angles of `inputs` for products with `like`.

        A position looks at its document; with `local` attention at no more than half a window on either side.
        """
        rate = self.config.attention_dropout if self.training else 0.0
        mask = make_mask(inputs, like, self.config.head_size, rate, self.config.window(local))
        return AttentionContext(mask, make_angles(self.config, inputs.position_ids, like, local))
