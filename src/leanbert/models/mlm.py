"""The masked language model: encoder and tied head.

Shapes: B batch, S sequence, M targets per row, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from leanbert.models.base import EncoderModel, gather_rows
from leanbert.models.config import ResolvedConfig
from leanbert.models.heads import MaskedLMHead
from leanbert.models.kernels.loss import cross_entropy_sum, linear_cross_entropy_sum


class MaskedLanguageModel(EncoderModel):
    """An encoder and the head that predicts the vocabulary at chosen positions."""

    task = "mlm"

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        self.head = MaskedLMHead(config)

    @property
    def num_parameters(self) -> int:
        """Parameters as published and exported: each row of the vocabulary has a bias in the head."""
        return super().num_parameters - (len(self.head.bias) - self.head.vocab_size)

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
