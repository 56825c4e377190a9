"""Metrics of each task, exact over batches of unequal size and over several devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from leanbert.models.loss import IGNORED, cross_entropy_sum


class MaskedLMMetrics(nn.Module):
    """Loss, perplexity and accuracy over masked positions, beside the loss of unigram counts on the same targets.

    Args:
        unigram_counts: Occurrences of each token in the training set, shape [V]; None: no baseline.

    """

    unigram_counts: Tensor | None

    def __init__(self, unigram_counts: Tensor | None = None) -> None:
        super().__init__()
        # a loss that is not a number shall be seen; to look for one would read values back at every batch
        self.loss, self.accuracy, self.unigram_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.register_buffer("unigram_counts", unigram_counts, persistent=False)  # integers: no dtype rounds them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLMMetrics:
        """Move with the model, but count in float32 where it is in bfloat16."""
        super()._apply(fn, recurse)
        for metric in (self.loss, self.accuracy, self.unigram_loss):
            metric.set_dtype(torch.float32)
        return self

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits [B, M, V] of any float type, targets [B, M] int64 with -100 in unused slots."""
        used = targets != IGNORED  # [B, M]
        weight = used.float()
        count = weight.sum()
        self.loss.update(cross_entropy_sum(logits, targets) / count.clamp(min=1), count)
        self.accuracy.update((logits.argmax(-1) == targets).float(), weight)
        if self.unigram_counts is not None:
            smoothed = self.unigram_counts + 1  # add-one: a target never seen in training has a finite loss
            log_probability = smoothed.float().log() - smoothed.sum().float().log()
            self.unigram_loss.update(-log_probability[torch.where(used, targets, 0)], weight)

    def compute(self) -> dict[str, float]:
        """Return the values by TensorBoard tag and start afresh."""
        loss = self.loss.compute()
        values = {"val/loss": loss, "val/perplexity": loss.exp(), "val/accuracy": self.accuracy.compute()}
        if self.unigram_counts is not None:
            values["val/unigram_loss"] = self.unigram_loss.compute()
        for metric in (self.loss, self.accuracy, self.unigram_loss):
            metric.reset()
        return {tag: float(value) for tag, value in values.items()}
