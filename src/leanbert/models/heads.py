"""Output heads on the encoder's hidden states.

Shapes: N any leading dimensions, D hidden, V vocabulary, R rows stored for it (V padded to a multiple of 64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanbert.models.config import ResolvedConfig
from leanbert.models.embeddings import padded_rows
from leanbert.models.kernels.loss import Mixture, cross_entropy_sum, linear_cross_entropy_sum
from leanbert.models.linear import Linear, Rounding, rounded


class Output(Linear):
    """A linear layer whose outputs are results, such as scores of labels, and not hidden states."""


def sum_in_chunks(loss: Callable[..., Tensor], chunk: int | None, *tensors: Tensor) -> Tensor:
    """Sum of `loss` over tensors [B, M, ...]: of about `chunk` targets at a time, computed again in the backward pass.

    None: of all at once.
    """
    if chunk is None:
        return loss(*tensors)
    columns = max(1, chunk // len(tensors[0]))
    pieces = zip(*(tensor.split(columns, dim=1) for tensor in tensors), strict=True)
    return torch.stack([checkpoint(loss, *piece, use_reentrant=False) for piece in pieces]).sum()


class MaskedLMHead(nn.Module):
    """Dense, GELU, norm, then scores against the token embedding: [N, D] -> [N, V].

    The matrix of the last step is the embedding's own, passed in by the caller; only its bias lives here. It may be
    rounded, as in a `Linear`.
    """

    round_weight: Rounding | None = None
    round_input: Rounding | None = None

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("the head is built after the tokenizer: config.vocab_size is None")
        self.vocab_size = config.vocab_size
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias)
        self.bias = nn.Parameter(torch.zeros(padded_rows(config.vocab_size)))

    def transform(self, hidden: Tensor) -> Tensor:
        """Return what is compared with the embedding, [N, D] -> [N, D]."""
        return self.norm(F.gelu(self.dense(hidden)))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Return logits [N, V] for `hidden` [N, D] and the token embedding [R, D]."""
        scores = F.linear(*self._factors(hidden, embedding), self.bias)  # [N, R]
        # Cutting the scores keeps the padding rows out of every softmax, and their gradient at zero.
        return scores if scores.shape[-1] == self.vocab_size else scores[..., : self.vocab_size]

    def loss_sum(
        self, hidden: Tensor, embedding: Tensor, targets: Tensor, chunk: int | None, smoothing: float = 0.0,
        mixture: Mixture | None = None,
    ) -> Tensor:  # fmt: skip
        """Cross entropy (nats, shape []) of `hidden` [..., D] summed over `targets` (int64 [...], -100: none).

        With `chunk` the scores of so many targets exist at a time. The rest is as in `cross_entropy_sum`.
        """
        if chunk is None:
            return cross_entropy_sum(self(hidden, embedding), targets, smoothing, mixture=mixture)
        inputs, matrix = self._factors(hidden, embedding)
        return linear_cross_entropy_sum(
            inputs.flatten(0, -2), matrix, self.bias, targets.flatten(),
            vocab_size=self.vocab_size, chunk=chunk, smoothing=smoothing, mixture=mixture,
        )  # fmt: skip

    def _factors(self, hidden: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        return rounded(self.transform(hidden), self.round_input), rounded(embedding, self.round_weight)
