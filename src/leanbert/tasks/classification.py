"""Classification of texts and of pairs of texts: one label, several, or numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchmetrics.functional.classification.accuracy import multiclass_accuracy
from torchmetrics.functional.classification.f_beta import multiclass_f1_score
from torchmetrics.functional.classification.matthews_corrcoef import multiclass_matthews_corrcoef
from torchmetrics.functional.regression.spearman import spearman_corrcoef

from leanbert.compression.distillation import soft_loss
from leanbert.data.batches.batch import IGNORED, LabelledBatch, PredictBatch
from leanbert.data.classification import ClassificationData
from leanbert.data.labels import Problem
from leanbert.data.module import RowData
from leanbert.data.settings import Part
from leanbert.errors import UserError
from leanbert.models.classifier import Classifier
from leanbert.models.stored import ModelMetadata
from leanbert.ranges import NOT_NEGATIVE, PART
from leanbert.tasks.base import Answer
from leanbert.tasks.labelling import Labelling
from leanbert.tasks.tables import markdown_table
from leanbert.tasks.techniques import Surroundings

METRICS: dict[Problem, tuple[str, ...]] = {
    "single": ("accuracy", "f1", "matthews"),
    "multi": ("accuracy", "f1", "f1_macro"),
    "regression": ("spearman",),
}
"""What is logged besides the loss."""


class TextClassification(Labelling[tuple[Tensor, Tensor]]):
    """Classify texts, or pairs of texts, by their first token (Devlin et al. 2019); the kind of labels is the data's.

    Args:
        class_weights: Weight of each label in the loss, by name; those left out weigh 1. For one label of several.
        threshold: Probability from which a label is given, where there may be several.
        settings: See `Task`.

    """

    name: ClassVar[str] = "classification"
    of: ClassVar = "text"
    _data: ClassificationData

    def __init__(self, class_weights: dict[str, float] | None = None, threshold: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        PART.check("model.threshold", threshold)
        NOT_NEGATIVE.check("model.class_weights", list((class_weights or {}).values()))
        self.class_weights, self.threshold = class_weights, threshold

    def build(self, around: Surroundings, mesh: DeviceMesh | None = None, *, fill: bool = True) -> None:
        """Check the class weights against the labels of the data, and build the weights."""
        self.problem = self._data.problem
        strange = sorted(set(self.class_weights or ()) - set(self._data.labels))
        if strange or (self.class_weights and self.problem != "single"):
            what = f"{strange[0]!r} is no label of the data" if strange else f"data.problem is {self.problem}"
            raise UserError(f"model.class_weights: {what}. Name labels of data with one label for each text")
        super().build(around, mesh, fill=fill)

    def metadata(self) -> ModelMetadata:
        """Return the threshold besides."""
        return replace(super().metadata(), threshold=self.threshold)

    def count_targets(self, batch: LabelledBatch) -> Tensor:
        """Return the number of labels, shape [], or the sum of their weights."""
        if not self.class_weights:
            return super().count_targets(batch)
        return self._weights_of(batch.targets).sum()

    def criterion(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses, each times the weight of its label."""
        if not self.class_weights:
            return super().criterion(scores, targets)
        return torch.nn.functional.cross_entropy(
            scores.flatten(0, 1).float(), targets.flatten(), self._weights(scores.device), ignore_index=IGNORED,
            reduction="sum",
        )  # fmt: skip

    def soft_criterion(self, scores: Tensor, teacher_scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence from a teacher's scores, each times the weight of the text's label."""
        if not self.class_weights:
            return super().soft_criterion(scores, teacher_scores, targets, temperature)
        return (soft_loss(scores, teacher_scores, temperature) * self._weights_of(targets)).sum()

    def _weights_of(self, targets: Tensor) -> Tensor:
        return self._weights(targets.device)[targets.clamp(min=0)] * (targets != IGNORED)

    def _weights(self, device: torch.device) -> Tensor:
        given, pin = self.class_weights or {}, device.type == "cuda"  # from there a copy does not make the host wait
        weights = torch.tensor([given.get(label, 1.0) for label in self.model.labels], pin_memory=pin)
        return weights.to(device, non_blocking=pin)

    # ---- evaluation and answers

    def predictions(self, scores: Tensor, batch: LabelledBatch) -> Tensor:
        """Return the best labels [B, M], probabilities of each, or numbers [B, M, L]."""
        if self.problem == "single":
            return scores.argmax(-1)
        return scores.float().sigmoid() if self.problem == "multi" else scores.float()

    def check_monitor(self, tag: str, data: RowData) -> None:
        """Raise UserError for a metric of another kind of labels."""
        problem = data.hparams["problem"]
        others = set(chain(*METRICS.values())).difference(METRICS[problem])
        if tag.removeprefix("val/") in others:
            names = ", ".join(f"val/{name}" for name in ("loss", *METRICS[problem]))
            raise UserError(f"checkpoint.monitor: {tag} is not logged where data.problem is {problem}. Choose {names}.")

    def kept(self, scores: Tensor, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        """Return predictions and targets of the texts, and of slots without one, [B * M] or [B * M, L]."""
        return self.predictions(scores, batch).flatten(0, 1).cpu(), batch.targets.flatten(0, 1).cpu()

    def evaluate(self, part: Part, kept: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Return accuracy, F1, Matthews correlation; with several labels F1s and exact match; Spearman of numbers."""
        guesses, truths = (torch.cat(values) for values in zip(*kept, strict=True))
        used = (truths != IGNORED) if self.problem == "single" else ~truths.isnan()[:, 0]
        guesses, truths, labels = guesses[used], truths[used], len(self.model.labels)
        if self.problem == "single":
            given = (guesses, truths, labels)
            found = {
                "accuracy": multiclass_accuracy(*given, average="micro"),
                "f1": multiclass_f1_score(*given, average="macro"),
                "matthews": multiclass_matthews_corrcoef(*given),
            }
        elif self.problem == "multi":
            found = multilabel_scores(guesses > self.threshold, truths.bool())
        else:
            found = {"spearman": spearman_corrcoef(guesses, truths).mean()}
        return {name: float(value) for name, value in found.items()}

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> list[Answer]:
        """Return one answer per text; see `classify`."""
        return classify(self.model, batch, self._data.problem, self.threshold)

    def samples(self, batch: LabelledBatch) -> dict[str, str]:
        """Return a table of texts with their labels and the labels that the model gives."""
        if self.problem != "single":
            return {}
        best = self.predictions(self(batch), batch).tolist()
        names, rows = self.model.labels, []
        for row in range(len(batch)):
            for slot, target in enumerate(batch.targets[row].tolist()):
                if target != IGNORED:
                    ids = batch.inputs.input_ids[row][batch.inputs.document_ids[row] == slot].tolist()
                    rows.append((self._data.tokenizer.decode(ids)[:200], names[target], names[best[row][slot]]))
        return {"samples/labels": markdown_table(("text", "truth", "model"), rows[:12])}


def multilabel_scores(guesses: Tensor, truths: Tensor) -> dict[str, Tensor]:
    """Return micro and macro F1 and exact match, each of shape [], of labels given or not: bool [N, L].

    A label that is neither given nor guessed has F1 0, as in torchmetrics, which refuses L = 1.
    """
    right, given = (guesses & truths).sum(0), guesses.sum(0) + truths.sum(0)  # [L]
    return {
        "f1": 2 * right.sum() / given.sum().clamp(min=1),
        "f1_macro": (2 * right / given.clamp(min=1)).mean(),
        "accuracy": (guesses == truths).all(-1).float().mean(),
    }


def classify(model: Classifier, batch: PredictBatch, problem: Problem, threshold: float = 0.5) -> list[Answer]:
    """Return for each text its label.

    `{"text", "label", "probability"}`; with several labels `{"text", "labels": [{"label", "probability"}, ...]}`, best
    first; with numbers `{"text", "values": [...]}`.
    """
    first = torch.zeros_like(batch.inputs.input_ids[:, :1])
    scores = model(batch.inputs, first)[:, 0].float()
    if problem == "regression":
        return [{"text": text, "values": row} for text, row in zip(batch.texts, scores.tolist(), strict=True)]
    probabilities = scores.softmax(-1) if problem == "single" else scores.sigmoid()
    answers: list[Answer] = []
    for text, row in zip(batch.texts, probabilities.tolist(), strict=True):
        ranked = sorted(zip(row, model.labels, strict=True), reverse=True)
        named = [{"label": label, "probability": round(probability, 6)} for probability, label in ranked]
        if problem == "single":
            answers.append({"text": text, **named[0]})
        else:
            answers.append({"text": text, "labels": [each for each in named if each["probability"] >= threshold]})
    return answers
