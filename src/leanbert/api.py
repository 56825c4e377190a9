"""Answers from Python: `leanbert.load(path).fill_mask(texts)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanbert import checkpoints
from leanbert.data.batch import PredictBatch
from leanbert.data.loading import encode_lines
from leanbert.data.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.build import build_model
from leanbert.models.config import EncoderConfig
from leanbert.models.convert import write_huggingface
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.tasks.mlm import fill_masks


class Pretrained:
    """A trained masked language model with its tokenizer, on the CPU until `to` moves it."""

    def __init__(self, model: MaskedLanguageModel, tokenizer: TextTokenizer) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def to(self, device: str | torch.device) -> Pretrained:
        """Move the model and return self."""
        self.model.to(device)
        return self

    def fill_mask(self, texts: Sequence[str], top_k: int = 5, batch_size: int = 32) -> list[dict[str, Any]]:
        """Return for each text with `[MASK]` in it `{"text", "masks": [[{"token", "probability"}, ...], ...]}`.

        Texts longer than the model's positions are cut.
        """
        with torch.inference_mode():
            return [
                answer
                for batch in self._batches(texts, batch_size)
                for answer in fill_masks(self.model, self.tokenizer, batch, top_k)
            ]

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Return one vector per text, float32 [N, D]: the mean of the last hidden states over its tokens."""
        with torch.inference_mode():
            vectors = [self._mean(batch) for batch in self._batches(texts, batch_size)]
        return torch.cat(vectors).cpu() if vectors else torch.empty(0, self.model.config.hidden_size)

    def export(self, folder: str | Path) -> None:
        """Write a Hugging Face folder with weights, configuration and tokenizer."""
        tokenizer = self.tokenizer
        special_ids = {
            "pad_token_id": tokenizer.pad_id,
            "cls_token_id": tokenizer.cls_id,
            "sep_token_id": tokenizer.sep_id,
        }
        write_huggingface(self.model, folder, {name: i for name, i in special_ids.items() if i is not None})
        self.tokenizer.save(folder)

    def _mean(self, batch: PredictBatch) -> Tensor:
        hidden = self.model.encode(
            batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids
        )  # [B, S, D]
        real = (batch.document_ids >= 0).unsqueeze(-1)  # [B, S, 1]
        return (hidden * real).sum(1).float() / real.sum(1)

    def _batches(self, texts: Sequence[str], batch_size: int) -> Iterator[PredictBatch]:
        device = next(self.model.parameters()).device
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch, _ = encode_lines(part, self.tokenizer, self.model.config.max_positions)
            yield batch.to(device)


def load(path: str | Path) -> Pretrained:
    """Load a trained model: a run's folder (its best checkpoint), a .ckpt file, or a Hugging Face folder.

    Nothing in the files is executed.

    Raises:
        UserError: The path is none of these, or is damaged.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        tokenizer = TextTokenizer.from_file(path)
        return Pretrained(build_model(EncoderConfig(), tokenizer.vocab_size, init_from=path), tokenizer)
    if (path / "checkpoints").is_dir():
        path = _best_or_last(path)
    if not path.is_file():
        raise UserError(f"{path}: no run, checkpoint or Hugging Face folder. Give the path of one.")
    stored = checkpoints.load(path)["leanbert"]
    tokenizer = TextTokenizer.from_json(stored["tokenizer"], source=str(path))
    return Pretrained(build_model(EncoderConfig(), tokenizer.vocab_size, init_from=path), tokenizer)


def _best_or_last(run: Path) -> Path:
    best = run / "checkpoints" / checkpoints.BEST
    return best if best.is_file() else checkpoints.newest_whole(run)
