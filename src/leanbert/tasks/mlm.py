"""Masked-language-model pretraining."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanbert.data.batches.batch import IGNORED, MLMBatch, PredictBatch
from leanbert.models.config import EncoderConfig
from leanbert.optim.build import OptimizerConfig, ScheduleConfig
from leanbert.pretrained.build import build_model
from leanbert.ranges import COUNT
from leanbert.tasks.base import Task
from leanbert.tasks.metrics import MaskedLMMetrics
from leanbert.tasks.tables import markdown_table


class MaskedLM(Task):
    """BERT's masked language model (Devlin et al. 2019), without next-sentence prediction.

    Args:
        encoder: Architecture of the encoder.
        optimizer: Optimizer and its settings.
        schedule: Learning rate by step.
        init_from: Hugging Face folder or LeanBERT checkpoint whose weights and architecture to start from.
        compile: Compile each block with torch.compile: faster steps after about a minute of compilation.
        seed: Seed of initial weights and dropout (the CLI sets it to seed_everything if it is 0).
        top_k: Candidates for each mask in the answers of `predict`.

    """

    name: ClassVar[str] = "mlm"
    example: ClassVar[str] = "The [MASK] of the function."

    def __init__(
        self,
        encoder: EncoderConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | None = None,
        compile: bool = False,
        seed: int = 0,
        top_k: int = 5,
    ) -> None:
        super().__init__(encoder, optimizer, schedule, init_from, compile, seed)
        COUNT.check("model.top_k", top_k)
        self.top_k = top_k
        self.metrics: MaskedLMMetrics | None = None

    def build_model(self) -> nn.Module:
        """Return the model whose vocabulary is the tokenizer's."""
        return build_model(
            self.encoder_config,
            self._data.tokenizer.vocab_size,
            init_from=self.init_from,
            unigram_counts=self._counts,
        )

    def build_metrics(self) -> None:
        """Make the metrics of masked positions."""
        self.metrics = MaskedLMMetrics(None if self._counts is None else torch.from_numpy(self._counts))

    @property
    def _counts(self) -> Any:
        return getattr(self._data, "unigram_counts", None)  # predict reads no corpus

    def forward(self, batch: MLMBatch) -> Tensor:
        """Return logits [B, M, V] at the target positions."""
        return self.model(batch.inputs, batch.target_index)

    def count_targets(self, batch: MLMBatch) -> Tensor:
        """Return the number of masked positions, shape []."""
        return (batch.targets != IGNORED).sum()

    def loss_sum(self, batch: MLMBatch) -> Tensor:
        """Return the cross entropy in nats summed over masked positions, shape []."""
        return self.model.loss_sum(batch.inputs, batch.target_index, batch.targets)

    def validation_step(self, batch: MLMBatch, batch_idx: int) -> None:
        """Add a batch to the metrics; logits are not kept."""
        assert self.metrics is not None
        self.metrics.update(self(batch), batch.targets)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics at the number of completed steps."""
        assert self.metrics is not None
        self.log_evaluation("val", self.metrics.compute())

    def samples(self, batch: MLMBatch) -> dict[str, str]:
        """Return a table with one target of each row."""
        return {"samples/filled_masks": filled_masks_table(batch, self(batch), self._data.tokenizer)}

    def closing_words(self, metrics: dict[str, float]) -> str:
        """Return loss, that of unigram counts, and accuracy."""
        return (
            f"val/loss {metrics['val/loss']:.3f}, unigram counts {metrics['val/unigram_loss']:.3f}, "
            f"accuracy {metrics['val/accuracy']:.1%}"
        )

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one answer per text; see `fill_masks`."""
        return fill_masks(self.model, self._data.tokenizer, batch, self.top_k)


def fill_masks(model: nn.Module, tokenizer: Any, batch: PredictBatch, top_k: int) -> list[dict[str, Any]]:
    """Return for each text `{"text", "masks": [[{"token", "probability"}, ...], ...]}`, best first.

    Args:
        model: A MaskedLanguageModel.
        tokenizer: Its TextTokenizer.
        batch: Texts with their padded ids [B, S].
        top_k: Candidates for each mask.

    """
    masked = batch.inputs.input_ids == tokenizer.mask_id  # [B, S]
    counts = masked.sum(1).tolist()
    answers: list[dict[str, Any]] = [{"text": text, "masks": []} for text in batch.texts]
    if not any(counts):
        return answers
    # the places of the masks first, in order: logits are made for these only
    index = masked.int().argsort(dim=1, descending=True, stable=True)[:, : max(counts)]  # [B, K]
    logits = model(batch.inputs, index)  # [B, K, V]
    best = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))  # [B, K, top_k]
    for answer, count, probabilities, tokens in zip(
        answers, counts, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        answer["masks"] = [
            [
                {"token": tokenizer.token(token), "probability": round(probability, 6)}
                for token, probability in zip(*candidates, strict=True)
            ]
            for candidates in zip(tokens[:count], probabilities[:count], strict=True)
        ]
    return answers


def filled_masks_table(batch: MLMBatch, logits: Tensor, tokenizer: Any, context: int = 10) -> str:
    """Return a Markdown table with one target of each row: text around the mask, truth, best three candidates.

    Args:
        batch: Rows with targets, [B, S] and [B, M].
        logits: Scores at the targets, [B, M, V].
        tokenizer: The TextTokenizer that made the ids.
        context: Tokens shown on each side of the mask.

    """
    best = logits.float().softmax(-1).topk(3)  # [B, M, 3]
    rows = []
    for row in range(len(batch)):
        slots = [m for m, target in enumerate(batch.targets[row].tolist()) if target != IGNORED]
        if not slots:
            continue
        slot = slots[len(slots) // 2]  # the middle of the row has context on both sides
        place = int(batch.target_index[row, slot])
        ids = batch.inputs.input_ids[row].tolist()
        left = tokenizer.decode(ids[max(0, place - context) : place])
        right = tokenizer.decode(ids[place + 1 : place + 1 + context])
        guesses = ", ".join(
            f"{tokenizer.decode([token])} ({probability:.0%})"
            for token, probability in zip(
                best.indices[row, slot].tolist(), best.values[row, slot].tolist(), strict=True
            )
        )
        truth = tokenizer.decode([int(batch.targets[row, slot])])
        rows.append((f"{left} **[{tokenizer.mask_token.strip('[]<>')}]** {right}", truth, guesses))
    return markdown_table(("text", "truth", "model"), rows)
