"""What each step logs: loss, learning rate, speed, memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.values import log_values
from leanbert.data.batches.batch import Batch
from leanbert.measure.counters import device_bytes, rss_bytes
from leanbert.units import MIB


class StepMonitor(Callback):
    """Log `train/*` and `memory/*` every `trainer.log_every_n_steps`, at the number of completed steps.

    Time spent in validation and in writing checkpoints is not counted. `train/tokens_per_second` is of the steps since
    the last value, `train/mean_tokens_per_second` of all, as `tokens_per_second` here: but for the first `warmup_steps`
    of this process, in which kernels are chosen and memory is first touched.
    """

    warmup_steps = 10

    def __init__(self) -> None:
        self.tokens = 0  # of all steps, resumed ones included
        self.seconds = 0.0
        self._steps = 0
        self._warm = self._logged = (0, 0.0)  # the totals after the warm-up, and at the last value
        self._started: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the totals of the run."""
        return {"tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the totals of the run."""
        self.tokens, self.seconds = self._warm = self._logged = state_dict["tokens"], state_dict["seconds"]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over all devices, the first steps excluded; None: too short to tell."""
        seconds = self.seconds - self._warm[1]
        return (self.tokens - self._warm[0]) / seconds if seconds else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: waiting for the loader counts."""
        self._started = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Start the clock where something else stopped it."""
        if self._started is None:
            self._started = time.perf_counter()

    def on_validation_start(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self._started = None

    on_save_checkpoint = on_validation_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the step and log."""
        now = time.perf_counter()
        seconds = now - (self._started or now)
        self._started = now
        tokens = batch.tokens * trainer.world_size
        self._count(tokens, seconds)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 or trainer.global_step == trainer.max_steps:
            self._log(trainer, pl_module.device, outputs)

    def _count(self, tokens: int, seconds: float) -> None:
        self._steps += 1
        self.tokens += tokens
        self.seconds += seconds
        if self._steps <= self.warmup_steps:
            self._warm = self.tokens, self.seconds

    def _log(self, trainer: Trainer, device: torch.device, outputs: Any) -> None:
        speed = (self.tokens - self._logged[0]) / max(self.seconds - self._logged[1], 1e-9)
        self._logged = self.tokens, self.seconds
        loss = float(outputs["step_loss"])
        memory = {"rss": rss_bytes(), **device_bytes(device)}
        values = {
            "train/loss": loss,
            "train/learning_rate": outputs["learning_rate"],
            "train/tokens_per_second": speed,
            **({} if self.tokens_per_second is None else {"train/mean_tokens_per_second": self.tokens_per_second}),
            **{f"memory/{name}_mib": size / MIB for name, size in memory.items()},
        }
        log_values(trainer, values)
        bar: Any = trainer.progress_bar_metrics
        bar.update({"loss": round(loss, 3), "tokens/s": round(speed)})
        trainer.callback_metrics["train/loss"] = torch.tensor(loss)
