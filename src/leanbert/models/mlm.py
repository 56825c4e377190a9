"""The masked language model: encoder and tied head.

Shapes: B batch, S sequence, M targets per row, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig
from leanbert.models.encoder import Encoder
from leanbert.models.heads import MaskedLMHead
from leanbert.models.loss import cross_entropy_sum, linear_cross_entropy_sum


def gather_rows(hidden: Tensor, target_index: Tensor) -> Tensor:
    """Pick positions `target_index` (int64 [B, M]) of each row of `hidden` [B, S, D]: [B, M, D]."""
    rows, length, width = hidden.shape
    offset = torch.arange(rows, device=hidden.device)[:, None] * length  # [B, 1]
    flat = (target_index + offset).flatten()  # [B * M]
    return hidden.reshape(rows * length, width).index_select(0, flat).view(rows, -1, width)


class MaskedLanguageModel(nn.Module):
    """An encoder and the head that predicts the vocabulary at chosen positions."""

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head = MaskedLMHead(config)
        self.head_chunk: int | None = None  # targets whose logits exist at a time in training; None: all

    @property
    def num_parameters(self) -> int:
        """Parameters as published and exported: without the padding rows of the vocabulary."""
        stored, width = self.encoder.embeddings.token.weight.shape
        padding = (stored - self.head.vocab_size) * (width + 1)  # each row has a bias in the head
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def encode(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, S, D]; arguments as in `Encoder.forward`."""
        return self.encoder(input_ids, position_ids=position_ids, document_ids=document_ids, segment_ids=segment_ids)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        target_index: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, M, V] at `target_index` (int64 [B, M], positions inside each row), else [B, S, V]."""
        hidden = self.encode(input_ids, position_ids=position_ids, document_ids=document_ids, segment_ids=segment_ids)
        if target_index is not None:
            hidden = gather_rows(hidden, target_index)
        return self.head(hidden, self.encoder.embeddings.token.weight)

    def loss_sum(
        self,
        input_ids: Tensor,
        target_index: Tensor,
        targets: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy (nats, shape []) summed over `targets` (int64 [B, M], -100: none) at `target_index` [B, M]."""
        hidden = self.encode(input_ids, position_ids=position_ids, document_ids=document_ids)
        hidden = gather_rows(hidden, target_index)  # [B, M, D]
        embedding = self.encoder.embeddings.token.weight
        if self.head_chunk is None:
            return cross_entropy_sum(self.head(hidden, embedding), targets)
        return linear_cross_entropy_sum(
            self.head.transform(hidden).flatten(0, 1),
            embedding,
            self.head.bias,
            targets.flatten(),
            vocab_size=self.head.vocab_size,
            chunk=self.head_chunk,
        )
