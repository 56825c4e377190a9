"""Filled masks as a table in TensorBoard, at every validation."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from leanbert.data.batch import MLMBatch
from leanbert.models.loss import IGNORED


class FilledMasks(Callback):
    """Show how the model fills the first masks of the first validation rows (the same ones every time).

    Args:
        count: Rows of the table.
        context: Tokens shown on each side of the mask.

    """

    def __init__(self, count: int = 12, context: int = 10) -> None:
        self.count, self.context = count, context
        self._batch: MLMBatch | None = None

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0:
            self._batch = batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not writers or self._batch is None or not trainer.is_global_zero:
            return
        batch = self._batch.split(min(len(self._batch), self.count))[0]
        with torch.no_grad():
            logits = pl_module(batch)  # [B, M, V]
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        table = filled_masks_table(batch, logits, data.tokenizer, self.context)
        writers[0].add_text("samples/filled_masks", table, global_step=trainer.global_step)


def filled_masks_table(batch: MLMBatch, logits: torch.Tensor, tokenizer: Any, context: int) -> str:
    """Return a Markdown table with one target of each row: text around the mask, truth, best three candidates.

    Args:
        batch: Rows with targets, [B, S] and [B, M].
        logits: Scores at the targets, [B, M, V].
        tokenizer: The TextTokenizer that made the ids.
        context: Tokens shown on each side of the mask.

    """
    best = logits.float().softmax(-1).topk(3)  # [B, M, 3]
    lines = ["| text | truth | model |", "| --- | --- | --- |"]
    for row in range(len(batch)):
        slots = [m for m, target in enumerate(batch.targets[row].tolist()) if target != IGNORED]
        if not slots:
            continue
        slot = slots[len(slots) // 2]  # the middle of the row has context on both sides
        place = int(batch.target_index[row, slot])
        ids = batch.input_ids[row].tolist()
        left = tokenizer.decode(ids[max(0, place - context) : place])
        right = tokenizer.decode(ids[place + 1 : place + 1 + context])
        guesses = ", ".join(
            f"{tokenizer.decode([token])} ({probability:.0%})"
            for token, probability in zip(
                best.indices[row, slot].tolist(), best.values[row, slot].tolist(), strict=True
            )
        )
        truth = tokenizer.decode([int(batch.targets[row, slot])])
        cells = (f"{left} **[{tokenizer.mask_token.strip('[]<>')}]** {right}", truth, guesses)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)
