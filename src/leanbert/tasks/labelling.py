"""Labels for texts and for words: what classification, tagging and semantic role labelling share."""

from __future__ import annotations

from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from leanbert.compression.distillation import soft_binary_loss
from leanbert.data.batches.batch import IGNORED, LabelledBatch
from leanbert.data.labelled import LabelledData
from leanbert.data.labels import Problem
from leanbert.data.settings import Part
from leanbert.models.classifier import Classifier, Of
from leanbert.models.kernels.loss import cross_entropy_sum
from leanbert.models.packed_inputs import PackedInputs
from leanbert.pretrained.build import build_model
from leanbert.tasks.base import Task
from leanbert.tasks.metrics import ExactSums, over_ranks

Kept = TypeVar("Kept")


class Labelling(Task[LabelledBatch], Generic[Kept]):
    """A task whose model is a `Classifier`; `Kept` is what evaluation keeps of a batch."""

    of: ClassVar[Of]
    problem: Problem = "single"
    model: Classifier
    _data: LabelledData

    # ---- what a task supplies

    def predictions(self, scores: Tensor, batch: LabelledBatch) -> Tensor:
        """Return what evaluation keeps of the scores [B, M, L]: [B, M] or [B, M, L]."""
        raise NotImplementedError

    def kept(self, scores: Tensor, batch: LabelledBatch) -> Kept:
        """Return what evaluation keeps of a batch, on the CPU."""
        raise NotImplementedError

    def evaluate(self, part: Part, kept: list[Kept]) -> dict[str, float]:
        """Return metrics by name from what was `kept` of all batches of "val" or "test", on all ranks."""
        raise NotImplementedError

    # ---- model, step

    def build_model(self) -> Classifier:
        """Return the model for the tokenizer and the labels of the data."""
        return build_model(
            self.encoder_config,
            self._data.tokenizer.vocab_size,
            lambda config: Classifier(config, self._data.labels, self.of, self.name),
            init_from=self.init_from,
        )

    def build_metrics(self) -> None:
        """Make the sums of the loss; other metrics are computed from what the batches keep."""
        self.sums = ExactSums("loss", "targets")
        self._kept: list[Kept] = []

    def model_inputs(self, batch: LabelledBatch) -> tuple[PackedInputs, Tensor]:
        """Return the rows, and the positions that are labelled."""
        return batch.inputs, batch.target_index

    def count_targets(self, batch: LabelledBatch) -> Tensor:
        """Return the number of labels that count, shape []: words or texts, times numbers where there are several."""
        targets = batch.targets
        return (known(targets, len(self.model.labels)) if self.problem == "single" else ~targets.isnan()).sum()

    def loss_sum(self, batch: LabelledBatch) -> Tensor:
        """Return the loss summed over targets, shape []."""
        return self.model.loss_sum(batch.inputs, batch.target_index, batch.targets, self.criterion)

    def criterion(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses, shape [], of scores [B, M, L]: cross entropy, of each label, or the squared error."""
        if self.problem == "single":
            return cross_entropy_sum(scores, targets.where(known(targets, scores.shape[-1]), IGNORED))
        used = ~targets.isnan()
        truth = targets.where(used, 0.0)
        if self.problem == "multi":
            losses = F.binary_cross_entropy_with_logits(scores.float(), truth, reduction="none")
        else:
            losses = (scores.float() - truth).square()
        return losses.where(used, 0.0).sum()

    def soft_criterion(self, scores: Tensor, teacher_scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence from a teacher's scores [B, M, L], summed; of numbers their squared distance."""
        if self.problem == "single":
            return super().soft_criterion(scores, teacher_scores, targets, temperature)
        used = ~targets.isnan()
        if self.problem == "multi":
            losses = soft_binary_loss(scores, teacher_scores, temperature)
        else:
            losses = (scores.float() - teacher_scores.float()).square()
        return losses.where(used, 0.0).sum()

    # ---- evaluation

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Add a batch to the loss, and keep its predictions."""
        scores = self(batch)
        self.sums.add(loss=self.criterion(scores, batch.targets), targets=self.count_targets(batch))
        self._kept.append(self.kept(scores, batch))

    test_step = validation_step

    def metrics_of(self, part: Part) -> dict[str, float]:
        """Return the loss, and what `evaluate` makes of the batches."""
        sums = self.sums.totals()
        kept, self._kept = over_ranks(self._kept), []
        return {"loss": float(sums["loss"] / sums["targets"]), **self.evaluate(part, kept)}


def known(targets: Tensor, labels: int) -> Tensor:
    """Return where targets [B, M] count in training: used, and of a label that the model has; bool [B, M]."""
    return (targets != IGNORED) & (targets < labels)


def gather_documents(batch: LabelledBatch) -> Tensor:
    """Return the document of each target, int64 [B, M]; -1 where there is none."""
    documents = batch.inputs.document_ids.gather(1, batch.target_index)
    return documents.where(batch.targets != IGNORED, torch.full_like(documents, -1))
