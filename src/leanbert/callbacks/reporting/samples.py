"""What the model makes of the first validation rows, in TensorBoard, at every validation."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.distributed.fsdp import FSDPModule

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
        """Write the tables, on the first rank; where weights are sharded all ranks run the model on its rows."""
        writers, task = tensorboard_writers(trainer), task_of(pl_module)
        sharded = isinstance(task.model, FSDPModule)
        if self._batch is None or not (writers or sharded):
            return
        batch = self._batch.split(min(len(self._batch), self.count))[0]
        if sharded:
            batch = trainer.strategy.broadcast(batch.to("cpu")).to(task.device)
        with torch.no_grad(), task.precision_of_steps():
            tables = task.samples(batch)
        for writer in writers[:1]:
            for tag, text in tables.items():
                writer.add_text(tag, text, global_step=trainer.global_step)
