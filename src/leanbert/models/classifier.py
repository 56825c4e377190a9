"""An encoder that scores labels: of whole texts, at their first token, or of words, at their first piece.

Shapes: B batch, S sequence, M targets per row, D hidden, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.models.base import ENCODER, EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.dropout import dropout
from leanbert.models.encoder import make_norm
from leanbert.models.heads import Output, sum_in_chunks
from leanbert.models.linear import Linear
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import ModelMetadata

Of = Literal["text", "word"]

INHERITED = ("head.dense.", "head.norm.", "head.pooler.")
"""What does not depend on the labels; with pre-norm a masked language model has it too, as in ModernBERT."""


class ClassificationHead(nn.Module):
    """Hidden states to scores of labels: [..., D] -> [..., L].

    With pre-norm: dense, GELU, norm, as in ModernBERT. With post-norm: for texts BERT's pooler (dense, tanh), for words
    nothing. Then dropout at the encoder's rate and a linear layer with a bias.
    """

    def __init__(self, config: ResolvedConfig, labels: int, of: Of) -> None:
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.dense = Linear(width, width, bias=config.bias) if config.norm_position == "pre" else None
        self.norm = make_norm(config) if config.norm_position == "pre" else None
        self.pooler = Linear(width, width) if config.norm_position == "post" and of == "text" else None
        self.scores = Output(width, labels)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the scores [..., L] of `hidden` [..., D]."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(F.gelu(self.dense(hidden)))
        elif self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        return self.scores(dropout(hidden, self.dropout, self.training))


class Classifier(EncoderModel):
    """An encoder and a head that scores `labels` at chosen positions.

    Args:
        config: Architecture of the encoder.
        labels: Names of the labels, in the order of the scores.
        of: What is labelled: a "text" at its first token, or a "word" at its first piece.
        task: Name of the task that trains it.

    """

    def __init__(self, config: ResolvedConfig, labels: Sequence[str], of: Of, task: str) -> None:
        super().__init__(config)
        self.labels, self.of = list(labels), of
        self.task = task
        self.head = ClassificationHead(config, len(self.labels), of)

    def inherits(self, name: str, metadata: ModelMetadata) -> bool:
        """Whether weight `name` of a stored model is taken over: all if it has the same labels, else not the scores.

        With post-norm nothing of a masked language model's head: the head of labels has no such layers.
        """
        if metadata.task == self.task and metadata.labels == self.labels:
            return True
        alike = metadata.task == self.task or (metadata.task == "mlm" and self.head.dense is not None)
        return name.startswith(ENCODER) or (alike and name.startswith(INHERITED))

    def logits(self, hidden: Tensor, copied: None = None) -> Tensor:
        """Scores [B, M, L] of hidden states [B, M, D]."""
        return self.head(hidden)

    def loss_sum(
        self, inputs: PackedInputs, target_index: Tensor, targets: Tensor, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Sum of `criterion(scores [B, m, L], targets [B, m, ...])`, shape [], over the targets at `target_index`.

        With `head_chunk`, the head works on so many targets at a time and is computed again in the backward pass.
        """
        hidden = self.encode(inputs, target_index)  # [B, M, D]
        return sum_in_chunks(lambda part, truth: criterion(self.head(part), truth), self.head_chunk, hidden, targets)
