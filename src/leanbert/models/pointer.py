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

    `shares` [B, T, S], at least float32: the probability of each source token, in sum that of copying at all; `kept`
    [B, T]: the logarithm of the rest, which is the vocabulary's; `ids`: those of the source.
    """

    shares: Tensor
    kept: Tensor
    ids: Tensor


class Pointer(nn.Module):
    """A pointer-generator (See et al. 2017, arXiv 1704.04368) with an attention of its own, of one head.

    The paper takes that of the decoder; the fused kernels of ours do not give their probabilities.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = Output(config.hidden_size, 1)

    @torch.no_grad()
    def look_for_the_same(self) -> None:
        """Begin by looking at source tokens whose encoding is like the decoder's state: what it is about to write."""
        for projection in (self.query, self.key):
            nn.init.eye_(projection.weight)

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


def copied_logarithm(copied: Copied, targets: Tensor) -> Tensor:
    """Log-probability [B, T] that `targets` (int64 [B, T]) are copied.

    For those that the source does not have it is that of the smallest number.
    """
    same = targets[:, :, None] == copied.ids[:, None, :]
    shares = (copied.shares * same).sum(-1)
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


def add_copied(logits: Tensor, copied: Copied) -> Tensor:
    """Log-probabilities [B, T, V] of both parts together; `logits` [B, T, V] are the vocabulary's."""
    own = logits.to(copied.kept.dtype).log_softmax(-1) + copied.kept[..., None]
    places = copied.ids[:, None, :].expand_as(copied.shares)
    whole = torch.zeros_like(own).scatter_add(-1, places, copied.shares)
    return torch.logaddexp(own, whole.clamp_min(torch.finfo(whole.dtype).tiny).log())
