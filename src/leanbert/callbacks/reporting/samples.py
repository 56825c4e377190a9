"""What the model makes of the first validation rows, in TensorBoard, at every validation."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.values import task_of, tensorboard_writers
from leanbert.data.batches.batch import Batch
from leanbert.ranges import COUNT


class Samples(Callback):
    """Show what the task makes of the first validation rows (the same ones every time), see `Task.samples`.

    Args:
        count: Rows of the batch.

    """

    def __init__(self, count: int = 12) -> None:
        COUNT.check("Samples.count", count)
        self.count = count
        self._batch: Batch | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first batch."""
        if batch_idx == 0:
            self._batch = batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the tables."""
        writers = tensorboard_writers(trainer)
        if not writers or self._batch is None:
            return
        batch = self._batch.split(min(len(self._batch), self.count))[0]
        with torch.no_grad():
            for tag, text in task_of(pl_module).samples(batch).items():
                writers[0].add_text(tag, text, global_step=trainer.global_step)
