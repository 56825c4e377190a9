"""A loss or gradient that is not finite is said, its batch saved, and some in a row stop the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert import checkpoints
from leanbert.callbacks.values import task_of
from leanbert.data.batches.batch import Batch
from leanbert.errors import TrainingFailed
from leanbert.messages import say
from leanbert.ranges import COUNT


@dataclass
class _Step:
    """A step whose values may still be on their way to the host."""

    number: int
    learning_rate: float
    batch: Batch
    values: torch.Tensor
    arrived: torch.Event | None


class StopOnBadSteps(Callback):
    """Stop when loss or gradients are not finite in so many steps in a row; see `StepCheck` for what they change.

    On an accelerator a step is judged when the next one is under way, so that nothing waits for its values.

    Args:
        most: Steps in a row that stop the run.

    Raises:
        TrainingFailed: There have been so many.

    """

    def __init__(self, most: int) -> None:
        COUNT.check("trainer.max_bad_steps", most)
        self.most = most
        self.in_a_row = 0
        self._folder = Path()
        self._previous: _Step | None = None

    def state_dict(self) -> dict[str, int]:
        """Return how many there are in a row."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.in_a_row = state_dict["in_a_row"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the run's folder, which the ranks exchange."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Judge this step, or on an accelerator the one before."""
        values = task_of(pl_module).step_state.check.values
        step = _Step(trainer.global_step, outputs["learning_rate"], batch, values, None)
        if values.device.type != "cpu":
            step.values, step.arrived = values.to("cpu", non_blocking=True), torch.Event(values.device)
            step.arrived.record()
            step, self._previous = self._previous, step  # type: ignore[assignment]
        self._judge(trainer, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the last step."""
        self._judge(trainer, self._previous)
        self._previous = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that a loss of validation is not finite."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not math.isfinite(loss):
            say(f"warning: val/loss is {float(loss)} after step {trainer.global_step:,}, which is no best checkpoint")

    def _judge(self, trainer: Trainer, step: _Step | None) -> None:
        if step is None:
            return
        if step.arrived is not None:
            step.arrived.synchronize()
        loss, norm = step.values.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"a gradient's norm is {norm}"
        path = self._save(trainer, step)
        say(f"warning: step {step.number:,}: {what}, its update is left out; the batch is in {path}")
        if self.in_a_row >= self.most:
            remedy = "" if trainer.precision == "32-true" else ", trainer.precision to 32-true"
            raise TrainingFailed(
                f"step {step.number:,}: {what}, at learning rate {step.learning_rate:g} in {trainer.precision}; such "
                f"steps in a row: {self.in_a_row} (trainer.max_bad_steps). Lower the learning rate, set "
                f"trainer.gradient_clip_val{remedy}, or look at the batch in {path}."
            )

    def _save(self, trainer: Trainer, step: _Step) -> Path:
        """Write the batch of this rank for `torch.load(path, weights_only=True)`."""
        rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
        path = self._folder / f"bad_batch{rank}.pt"
        loss, norm = step.values.tolist()
        batch = step.batch.to("cpu").tensors()
        checkpoints.save({"step": step.number, "loss": loss, "gradient_norm": norm, "batch": batch}, path)
        return path
