"""Metrics of each task, exact over batches of unequal size and over several devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchmetrics.aggregation import SumMetric

from leanbert.data.batches.batch import IGNORED
from leanbert.models.kernels.loss import cross_entropy_sum

Item = TypeVar("Item")


class ExactSums(nn.Module):
    """Sums in float32, where the model is in bfloat16 too, exact over batches and devices; reset by `totals`.

    Args:
        names: What is summed.

    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        # a loss that is not a number shall be seen; to look for one would read values back at every batch.
        # Sums, because MeanMetric with "disable" forgets its weights (torchmetrics 1.9)
        self.sums = nn.ModuleDict({name: SumMetric(nan_strategy="disable") for name in names})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactSums:
        super()._apply(fn, recurse)
        for metric in self.sums.values():
            metric.set_dtype(torch.float32)  # type: ignore[operator]
        return self

    def add(self, **values: Tensor) -> None:
        """Add the elements of each tensor."""
        for name, value in values.items():
            self.sums[name].update(value.float())  # type: ignore[operator]

    def totals(self) -> dict[str, Tensor]:
        """Return the sums over all devices, each of shape [], and start afresh."""
        found = {name: metric.compute() for name, metric in self.sums.items()}  # type: ignore[operator]
        for metric in self.sums.values():
            metric.reset()  # type: ignore[operator]
        return found


class MaskedLMMetrics(nn.Module):
    """Loss, perplexity and accuracy over masked positions, beside the loss of unigram counts on the same targets.

    Args:
        unigram_counts: Occurrences of each token in the training set, shape [V]; None: no baseline.

    """

    unigram_counts: Tensor | None

    def __init__(self, unigram_counts: Tensor | None = None) -> None:
        super().__init__()
        self.sums = ExactSums("targets", "loss", "correct", "unigram_loss")
        self.register_buffer("unigram_counts", unigram_counts, persistent=False)  # integers: no dtype rounds them

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits [B, M, V] of any float type, targets [B, M] int64 with -100 in unused slots."""
        used = targets != IGNORED  # [B, M]
        self.sums.add(
            targets=used,
            loss=cross_entropy_sum(logits, targets),
            correct=logits.argmax(-1) == targets,  # never -100
        )
        if self.unigram_counts is not None:
            smoothed = self.unigram_counts + 1  # add-one: a target never seen in training has a finite loss
            log_probability = smoothed.float().log() - smoothed.sum().float().log()
            self.sums.add(unigram_loss=-log_probability[torch.where(used, targets, 0)] * used)

    def compute(self) -> dict[str, float]:
        """Return the values by name and start afresh."""
        totals = self.sums.totals()
        count = totals["targets"]
        loss = totals["loss"] / count
        values = {"loss": loss, "perplexity": loss.exp(), "accuracy": totals["correct"] / count}
        if self.unigram_counts is not None:
            values["unigram_loss"] = totals["unigram_loss"] / count
        return {name: float(value) for name, value in values.items()}


def over_ranks(own: list[Item]) -> list[Item]:
    """Return the items of all ranks, of which each rank may have another number, or none."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return own
    parts: list[list[Item]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    return [item for part in parts for item in part]
