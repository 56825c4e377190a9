"""Token, segment and absolute position embeddings.

Shapes: B batch, S sequence, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig
from leanbert.models.dropout import dropout
from leanbert.models.linear import Rounding, rounded
from leanbert.models.packed_inputs import PackedInputs

INIT_STD = 0.02
ROW_MULTIPLE = 64


def padded_rows(vocab_size: int) -> int:
    """Rows that are stored for `vocab_size` tokens: the next multiple of 64, which matrix kernels like."""
    return -(-vocab_size // ROW_MULTIPLE) * ROW_MULTIPLE


def sinusoidal_table(positions: int, width: int) -> Tensor:
    """Return the fixed table [positions, width] of Vaswani et al. 2017 (arXiv 1706.03762), float32.

    Scaled to the root mean square with which learned embeddings begin: at full size it would drown tokens.
    """
    wavelength = 10_000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] / wavelength
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1) * (INIT_STD * 2**0.5)


class Embeddings(nn.Module):
    """Sum of token, segment and absolute position embeddings, normalised: [B, S] -> [B, S, D].

    Without `tokens` of its own, as in a decoder, their table comes with each call. Each table may be rounded before it
    is read (quantization-aware training). With a `projection` the table of tokens is thin, [R, r], and what is read of
    it is widened to D.
    """

    token: nn.Embedding
    fixed_position: Tensor | None
    round_tokens: Rounding | None = None
    round_segments: Rounding | None = None
    round_positions: Rounding | None = None

    def __init__(self, config: ResolvedConfig, tokens: bool = True) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the encoder is built after the tokenizer: config.vocab_size is None")
        width = config.hidden_size
        self.token = nn.Embedding(padded_rows(config.vocab_size), width) if tokens else None  # type: ignore[assignment]
        self.segment = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.position = nn.Embedding(config.max_positions, width) if config.position == "learned" else None
        fixed = None
        if config.position == "sinusoidal":
            fixed = sinusoidal_table(config.max_positions, width).to(torch.get_default_dtype())
        self.register_buffer("fixed_position", fixed, persistent=False)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
        self.dropout = config.dropout
        self.projection: nn.Linear | None = None

    def forward(self, inputs: PackedInputs, embedding: Tensor | None = None) -> Tensor:
        """Embed ids; tokens with another table `embedding` [R, D] if one is given."""
        table = rounded(self.token.weight if embedding is None else embedding, self.round_tokens)
        hidden = nn.functional.embedding(inputs.input_ids, table)
        if self.projection is not None:
            hidden = self.projection(hidden)
        if self.segment is not None:
            segments, table = inputs.segment_ids, rounded(self.segment.weight, self.round_segments)
            hidden = hidden + (table[0] if segments is None else nn.functional.embedding(segments, table))
        positions = self.fixed_position if self.position is None else self.position.weight
        if positions is not None:
            hidden = hidden + nn.functional.embedding(inputs.position_ids, rounded(positions, self.round_positions))
        return dropout(self.norm(hidden), self.dropout, self.training)
