"""Copying from the source: a distribution over its tokens beside that over the vocabulary, and how much each counts.

Shapes: B batch, T target tokens, S source tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig
from leanbert.models.heads import Output
from leanbert.models.linear import Linear


class Source(NamedTuple):
    """What is pointed at: keys [B, S, D] of source tokens, their ids (int64 [B, S]), and which are allowed.

    `allowed` is bool [B, T or 1, S].
    """

    key: Tensor
    ids: Tensor
    allowed: Tensor

    def select(self, rows: Tensor) -> Source:
        """Return these rows of the batch (int64)."""
        return Source(*(tensor[rows] for tensor in self))


class Copied(NamedTuple):
    """The part of the next token's distribution that is copied.

    `probs` [B, T, S], at least float32: the probability of each source token, in sum the probability of copying at
    all; `log_generate` [B, T]: the logarithm of the rest, which is the vocabulary's; `ids`: the source's tokens.
    """

    probs: Tensor
    log_generate: Tensor
    ids: Tensor


class Pointer(nn.Module):
    """A pointer-generator (See et al. 2017, arXiv 1704.04368) with an attention of its own, of one head.

    The paper takes the decoder's attention; our fused kernels do not give its probabilities.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = Output(config.hidden_size, 1)

    @torch.no_grad()
    def initialise_to_identity(self) -> None:
        """Begin by looking at source tokens whose encoding is like the decoder's state: what it is about to write."""
        for projection in (self.query, self.key):
            projection.weight.copy_(torch.eye(*projection.weight.shape))

    def read(self, memory: Tensor, ids: Tensor, allowed: Tensor) -> Source:
        """Return what is pointed at, of the encoder's output [B, S, D] and the rest of a `Source`."""
        return Source(self.key(memory), ids, allowed)

    def forward(self, hidden: Tensor, source: Source) -> Copied:
        """Point from decoder states [B, T, D]; where nothing is allowed the result has no meaning, but is finite."""
        scores = (self.query(hidden) * hidden.shape[-1] ** -0.5) @ source.key.mT  # [B, T, S]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(~source.allowed, torch.finfo(scores.dtype).min)
        gate = self.gate(hidden).to(scores.dtype)  # [B, T, 1]
        return Copied(scores.softmax(-1) * gate.sigmoid(), F.logsigmoid(-gate).squeeze(-1), source.ids)


def copied_log_probs(copied: Copied, targets: Tensor) -> Tensor:
    """Log-probability [B, T] that `targets` (int64 [B, T]) are copied.

    For a target that the source does not have: the logarithm of the smallest number.
    """
    same = targets[:, :, None] == copied.ids[:, None, :]
    probs = (copied.probs * same).sum(-1)
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def add_copied(logits: Tensor, copied: Copied) -> Tensor:
    """Log-probabilities [B, T, V] of both parts together; `logits` [B, T, V] are the vocabulary's."""
    generated = logits.to(copied.log_generate.dtype).log_softmax(-1) + copied.log_generate[..., None]
    ids = copied.ids[:, None, :].expand_as(copied.probs)
    probs = torch.zeros_like(generated).scatter_add(-1, ids, copied.probs)
    return torch.logaddexp(generated, probs.clamp_min(torch.finfo(probs.dtype).tiny).log())
