"""Copying from the source: a distribution over its tokens beside that over the vocabulary, and how much each counts.

Shapes: B batch, T target tokens, S source tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.models.config import ResolvedConfig


class Copied(NamedTuple):
    """The part of the next token's distribution that is copied.

    `shares` [B, T, S], at least float32: the probability of each source token, in sum that of copying at all; `kept`
    [B, T]: the logarithm of the rest, which is the vocabulary's.
    """

    shares: Tensor
    kept: Tensor


class Pointer(nn.Module):
    """A pointer-generator (See et al. 2017, arXiv 1704.04368) with an attention of its own, of one head.

    The paper takes that of the decoder; the fused kernels of ours do not give their probabilities.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.gate = nn.Linear(config.hidden_size, 1)

    @torch.no_grad()
    def look_for_the_same(self) -> None:
        """Begin by looking at source tokens whose encoding is like the decoder's state: what it is about to write."""
        for projection in (self.query, self.key):
            nn.init.eye_(projection.weight)

    def forward(self, hidden: Tensor, key: Tensor, allowed: Tensor | None) -> Copied:
        """Point from decoder states [B, T, D] at source tokens [B, S, D], projected by `key` already.

        `allowed` is bool [B, T or 1, S]; None: all. Where nothing is allowed the result has no meaning, but is finite.
        """
        scores = (self.query(hidden) * hidden.shape[-1] ** -0.5) @ key.mT
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        gate = self.gate(hidden).to(scores.dtype)  # [B, T, 1]
        return Copied(scores.softmax(-1) * gate.sigmoid(), F.logsigmoid(-gate).squeeze(-1))


def copied_logarithm(copied: Copied, ids: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [B, T] that `targets` (int64 [B, T]) are copied from the source `ids` (int64 [B, S]).

    For those that the source does not have it is that of the smallest number.
    """
    same = targets[:, :, None] == ids[:, None, :]
    shares = (copied.shares * same).sum(-1)
    return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


def add_copied(logits: Tensor, copied: Copied, ids: Tensor) -> Tensor:
    """Log-probabilities [B, T, V] of both parts: `logits` [B, T, V] are the vocabulary's, `ids` int64 [B, S]."""
    own = logits.to(copied.kept.dtype).log_softmax(-1) + copied.kept[..., None]
    places = ids[:, None, :].expand_as(copied.shares)
    whole = torch.zeros_like(own).scatter_add(-1, places, copied.shares)
    return torch.logaddexp(own, whole.clamp_min(torch.finfo(whole.dtype).tiny).log())
