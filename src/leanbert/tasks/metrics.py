"""Metrics of each task, exact over batches of unequal size and over several devices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from leanbert.models.loss import IGNORED, cross_entropy_sum


class MaskedLMMetrics(nn.Module):
    """Loss, perplexity and accuracy over masked positions, beside the loss of unigram counts on the same targets.

    Args:
        unigram_counts: Occurrences of each token in the training set, shape [V]; None: no baseline.

    """

    unigram_counts: Tensor | None

    def __init__(self, unigram_counts: Tensor | None = None) -> None:
        super().__init__()
        # a loss that is not a number shall be seen; to look for one would read values back at every batch.
        # Sums, because MeanMetric with "disable" forgets its weights (torchmetrics 1.9)
        self.targets, self.loss, self.correct, self.unigram_loss = (SumMetric(nan_strategy="disable") for _ in range(4))
        self.register_buffer("unigram_counts", unigram_counts, persistent=False)  # integers: no dtype rounds them

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLMMetrics:
        """Move with the model, but count in float32 where it is in bfloat16."""
        super()._apply(fn, recurse)
        for metric in self._sums():
            metric.set_dtype(torch.float32)
        return self

    def _sums(self) -> tuple[SumMetric, ...]:
        return self.targets, self.loss, self.correct, self.unigram_loss

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits [B, M, V] of any float type, targets [B, M] int64 with -100 in unused slots."""
        used = targets != IGNORED  # [B, M]
        self.targets.update(used.float())
        self.loss.update(cross_entropy_sum(logits, targets))
        self.correct.update((logits.argmax(-1) == targets).float())  # never -100
        if self.unigram_counts is not None:
            smoothed = self.unigram_counts + 1  # add-one: a target never seen in training has a finite loss
            log_probability = smoothed.float().log() - smoothed.sum().float().log()
            self.unigram_loss.update(-log_probability[torch.where(used, targets, 0)] * used)

    def compute(self) -> dict[str, float]:
        """Return the values by TensorBoard tag and start afresh."""
        count = self.targets.compute()
        loss = self.loss.compute() / count
        values = {"val/loss": loss, "val/perplexity": loss.exp(), "val/accuracy": self.correct.compute() / count}
        if self.unigram_counts is not None:
            values["val/unigram_loss"] = self.unigram_loss.compute() / count
        for metric in self._sums():
            metric.reset()
        return {tag: float(value) for tag, value in values.items()}
