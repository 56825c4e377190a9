"""The masked language model: encoder and tied head.

Shapes: B batch, S sequence, M targets per row, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from leanbert.models.base import EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.heads import MaskedLMHead
from leanbert.models.packed_inputs import PackedInputs


class MaskedLanguageModel(EncoderModel):
    """An encoder and the head that predicts the vocabulary at chosen positions."""

    task = "mlm"

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__(config)
        self.head = MaskedLMHead(config)

    def logits(self, hidden: Tensor, copied: None = None) -> Tensor:
        """Logits [B, M, V] of hidden states [B, M, D]."""
        return self.head(hidden, self.encoder.embeddings.token.weight)

    def loss_sum(self, inputs: PackedInputs, target_index: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy (nats, shape []) summed over `targets` (int64 [B, M], -100: none) at `target_index` [B, M]."""
        hidden = self.encode(inputs, target_index)  # [B, M, D]
        return self.head.loss_sum(hidden, self.encoder.embeddings.token.weight, targets, self.head_chunk)
