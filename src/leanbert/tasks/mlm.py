"""Masked-language-model pretraining."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanbert.data.batches.batch import IGNORED, MLMBatch, PredictBatch
from leanbert.data.batches.loading import encode_lines
from leanbert.data.mlm import MaskedLMData
from leanbert.data.settings import Part
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.packed_inputs import PackedInputs
from leanbert.pretrained.build import build_model
from leanbert.ranges import COUNT
from leanbert.tasks.base import Answer, Task
from leanbert.tasks.metrics import MaskedLMMetrics
from leanbert.tasks.tables import markdown_table

SHOWN_CHARACTERS = 160
"""Length of the beginning of a text that the table of filled masks shows, and the model reads."""


class MaskedLM(Task[MLMBatch]):
    """BERT's masked language model (Devlin et al. 2019), without next-sentence prediction.

    Args:
        top_k: Candidates for each mask in the answers of `predict`.
        settings: See `Task`.

    """

    name: ClassVar[str] = "mlm"
    example: ClassVar[str] = "The [MASK] of the function."
    model: MaskedLanguageModel
    metrics: MaskedLMMetrics
    _data: MaskedLMData

    def __init__(self, top_k: int = 5, **settings: Any) -> None:
        super().__init__(**settings)
        COUNT.check("model.top_k", top_k)
        self.top_k = top_k
        self._hidden_words: list[HiddenWord] | None = None

    def build_model(self) -> MaskedLanguageModel:
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
    def _counts(self) -> np.ndarray | None:
        return getattr(self._data, "unigram_counts", None)  # predict reads no corpus

    def model_inputs(self, batch: MLMBatch) -> tuple[PackedInputs, Tensor]:
        """Return the rows, and the positions of the masks."""
        return batch.inputs, batch.target_index

    def count_targets(self, batch: MLMBatch) -> Tensor:
        """Return the number of masked positions, shape []."""
        return (batch.targets != IGNORED).sum()

    def loss_sum(self, batch: MLMBatch) -> Tensor:
        """Return the cross entropy in nats summed over masked positions, shape []."""
        return self.model.loss_sum(batch.inputs, batch.target_index, batch.targets)

    def validation_step(self, batch: MLMBatch, batch_idx: int) -> None:
        """Add a batch to the metrics; logits are not kept."""
        self.metrics.update(self(batch), batch.targets)

    def metrics_of(self, part: Part) -> dict[str, float]:
        """Return loss, perplexity and accuracy, and the loss of unigram counts."""
        return self.metrics.compute()

    def samples(self, batch: MLMBatch) -> dict[str, str]:
        """Return a table of as many validation texts as the batch has rows, each with one word masked."""
        data = self._data
        length = data.hparams["max_length"]
        if self._hidden_words is None:
            self._hidden_words = hide_words(data.validation_texts(), data.tokenizer, len(batch), length)
        if not self._hidden_words:
            return {}
        table = filled_masks_table(self.model, data.tokenizer, self._hidden_words, length, self.device)
        return {"samples/filled_masks": table}

    def closing_words(self, metrics: dict[str, float]) -> str:
        """Return the loss, the loss of unigram counts, and accuracy."""
        return (
            f"val/loss {metrics['val/loss']:.3f}, unigram counts {metrics['val/unigram_loss']:.3f}, "
            f"accuracy {metrics['val/accuracy']:.1%}"
        )

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> list[Answer]:
        """Return one answer per text; see `fill_masks`."""
        return fill_masks(self.model, self._data.tokenizer, batch, self.top_k)


class HiddenWord(NamedTuple):
    """A text, and the word `text[start:end]` to mask: `token` is the number of its token."""

    text: str
    token: int
    start: int
    end: int


def candidates(model: MaskedLanguageModel, batch: PredictBatch, index: Tensor, top_k: int) -> torch.return_types.topk:
    """Return `values`, the highest probabilities, and `indices`, their tokens, at `index` [B, K]: [B, K, k]."""
    logits = model(batch.inputs, index)  # [B, K, V]
    return logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))


def fill_masks(model: MaskedLanguageModel, tokenizer: TextTokenizer, batch: PredictBatch, top_k: int) -> list[Answer]:
    """Return for each text `{"text", "masks": [[{"token", "probability"}, ...], ...]}`, best first.

    Args:
        model: A MaskedLanguageModel.
        tokenizer: Its TextTokenizer.
        batch: Texts with their padded ids [B, S].
        top_k: Candidates for each mask.

    """
    masked = batch.inputs.input_ids == tokenizer.mask_id  # [B, S]
    counts = masked.sum(1).tolist()
    answers: list[Answer] = [{"text": text, "masks": []} for text in batch.texts]
    if not any(counts):
        return answers
    # the positions of the masks first, in order: logits are made for these only
    index = masked.int().argsort(dim=1, descending=True, stable=True)[:, : max(counts)]  # [B, K]
    best = candidates(model, batch, index, top_k)
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


def hide_words(texts: Iterable[str], tokenizer: TextTokenizer, count: int, length: int) -> list[HiddenWord]:
    """Return one word of each of the first `count` texts: of those that are one token, the middle one.

    Args:
        texts: Documents, of which those without such a word are passed over, but not more than three in four.
        tokenizer: The TextTokenizer.
        count: Words wanted.
        length: Tokens of a text that the model reads, with the template's.

    """
    room = length - sum(map(len, tokenizer.template))
    hidden = []
    for text in islice(texts, 4 * count):
        shown = text.strip()
        if len(shown) > SHOWN_CHARACTERS:
            shown = shown[:SHOWN_CHARACTERS].rsplit(maxsplit=1)[0]
        words = [word for word in tokenizer.whole_words(shown) if word[0] < room]
        if words:
            hidden.append(HiddenWord(shown, *words[len(words) // 2]))
    return hidden[:count]


def filled_masks_table(
    model: MaskedLanguageModel,
    tokenizer: TextTokenizer,
    words: list[HiddenWord],
    length: int,
    device: torch.device | str = "cpu",
) -> str:
    """Return a Markdown table of the texts with their masks, the words there, and the model's best three tokens."""
    batch, _ = encode_lines([word.text for word in words], tokenizer, length, masks=False)
    before = len(tokenizer.template[0])
    index = torch.tensor([[before + word.token] for word in words])  # [B, 1]
    batch.inputs.input_ids.scatter_(1, index, tokenizer.mask_id)
    best = candidates(model, batch.to(device), index.to(device), 3)
    rows = []
    for word, values, tokens in zip(words, best.values[:, 0].tolist(), best.indices[:, 0].tolist(), strict=True):
        masked = f"{word.text[: word.start]}[MASK]{word.text[word.end :]}"
        guesses = ", ".join(
            f"{tokenizer.decode([token]).strip()} ({value:.0%})" for token, value in zip(tokens, values, strict=True)
        )
        rows.append((masked, word.text[word.start : word.end], guesses))
    return markdown_table(("text", "truth", "model"), rows)
