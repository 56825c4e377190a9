"""Checkpoints of a run: the newest by steps or minutes, the best by validation, the last, and a mean, at the end."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from leanbert.callbacks.loop.averaging import KeptWeights, validate_with
from leanbert.callbacks.values import log_values
from leanbert.checkpoints import AVERAGE, BEST, put_aside, remove, step_name, step_of
from leanbert.distributed.shard_writing import ShardWriting
from leanbert.distributed.strategy import IN_SHARDS, FullySharded
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.ranges import COUNT, POSITIVE, Range, check_ranges

ASK_RANKS_EVERY = 10
"""Steps between two exchanges between ranks about saving or stopping: each makes all of them wait."""


class RunCheckpoint(Checkpoint):
    """Save into `<run>/checkpoints/`; each is whole, or not there (see `leanbert.checkpoints`).

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        every_n_minutes: Save also when this much time has passed; None: by steps only.
        keep: Newest checkpoints that are kept; two, so that a damaged one has one before it.
        monitor: Metric whose best value is kept as `best.ckpt`.
        mode: Whether the smallest or the largest value is the best.
        average_last: Validations whose weights are averaged into `average.ckpt` when the run ends: the last ones.
            Their weights are kept in `checkpoints/weights/`, without optimizer state; None: no average.
        average_best: The same of the validations with the best values of `monitor`.

    Raises:
        UserError: A setting is out of its range, one validation is to be averaged, or the last and the best are.

    """

    def __init__(
        self,
        every_n_steps: int = 500,
        every_n_minutes: float | None = 10.0,
        keep: int = 2,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        average_last: int | None = None,
        average_best: int | None = None,
    ) -> None:
        ranges = {"every_n_steps": COUNT, "every_n_minutes": POSITIVE, "keep": COUNT}
        ranges |= dict.fromkeys(("average_last", "average_best"), Range(least=2, whole=True))
        check_ranges("checkpoint", locals(), ranges)
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.keep, self.monitor, self.sign = keep, monitor, 1.0 if mode == "min" else -1.0
        self.average = _average(average_last, average_best, monitor, self.sign)
        self.average_path: str | None = None
        self.best: float | None = None
        self.last_path: str | None = None
        self._started: str | None = None
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Return what decides about later saves."""
        average = None if self.average is None else self.average.state_dict()
        return {"best": self.best, "rule": self._rule, "average": average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best value so far, unless it is of another metric, and the validations to be averaged."""
        if state_dict.get("rule", self._rule) == self._rule:
            self.best = state_dict["best"]
        average = state_dict.get("average")
        if self.average is not None and average is not None:
            self.average.load_state_dict(average)

    @property
    def _rule(self) -> list[Any]:
        return [self.monitor, self.sign]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise UserError if the weights of this run cannot be averaged."""
        if stage == "fit" and self.average is not None:
            self.average.check(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look which weights to be averaged are there, before the first validation."""
        if self.average is not None:
            self.average.find(trainer, self._folder(trainer))
            self.average.announce(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count minutes from here; what was loaded need not be saved again."""
        folder, path = self._folder(trainer), self._folder(trainer) / step_name(trainer.global_step)
        if trainer.is_global_zero and folder.is_dir():
            clear_for(folder, trainer.global_step)
            self._drop_old(folder)  # unless a kill has come between
            if self.average is not None:
                self.average.clear(folder)
        has_best, is_saved = trainer.strategy.broadcast(((folder / BEST).is_file(), path.exists()))
        if not has_best:  # of a course that has been left, or of the run that this one started from
            self.best = None
        self._saved_at = time.monotonic()
        if is_saved:
            self._saved_step, self.last_path = trainer.global_step, str(path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save when steps or minutes are due; the last step is saved after its validation."""
        if trainer.global_step == trainer.max_steps:
            return
        if trainer.global_step % self.every_n_steps == 0 or self._overdue(trainer):
            self.save(trainer)

    def _overdue(self, trainer: Trainer) -> bool:
        """Return whether minutes have passed, on the first rank's clock, or a save has failed in the background."""
        if self.every_n_minutes is None:
            return False
        writing = _writing(trainer)
        failed = writing is not None and writing.failed
        overdue = failed or time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return overdue
        return trainer.global_step % ASK_RANKS_EVERY == 0 and trainer.strategy.broadcast(overdue)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best so far, and the weights to be averaged.

        Raises:
            UserError: The metric is not logged, which the first validation shows.

        """
        if trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            logged = sorted(tag for tag in trainer.callback_metrics if "/" in tag)
            raise UserError(f"checkpoint.monitor: no {self.monitor} is logged. Choose from {', '.join(logged)}.")
        if self.average is not None:
            self.average.keep(trainer, self._folder(trainer))
        if trainer.global_step == 0:
            return
        if math.isfinite(value) and (self.best is None or self.sign * float(value) < self.sign * self.best):
            self.best = float(value)
            self._write(trainer, self._folder(trainer) / BEST)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last state, and validate the mean."""
        self.save(trainer)
        self.finish(trainer)
        path = None if self.average is None else self.average.write_mean(trainer, self._folder(trainer))
        if path is not None:
            self.average_path = str(path)
            self._validate_mean(trainer, pl_module, path)

    def _validate_mean(self, trainer: Trainer, pl_module: LightningModule, path: Path) -> None:
        """Log the metrics of the mean as `average/...`, and say them beside the best's."""
        found = validate_with(trainer, pl_module, path)
        logged = {tag.replace("val/", "average/", 1): value for tag, value in found.items()}
        log_values(trainer, logged)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in logged.items()})
        if self.monitor in found and self.best is not None:
            say(f"average: {self.monitor} {found[self.monitor]:.4f}, of the best checkpoint {self.best:.4f}")

    def save(self, trainer: Trainer) -> None:
        """Save the state after the last completed step, unless it is saved already, and drop old ones.

        Shards may be written in the background. Raises UserError if that failed the time before.
        """
        if trainer.global_step == self._saved_step:
            return
        self.finish(trainer)
        path = self._folder(trainer) / step_name(trainer.global_step)
        self._write(trainer, path, IN_SHARDS)
        self._started = str(path)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        writing = _writing(trainer)
        if writing is None or not writing.pending:
            self.finish(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Wait until what was saved last is whole, and drop old ones. Raises UserError if the disk is full."""
        if (writing := _writing(trainer)) is not None:
            writing.finish()
        if self._started is not None:
            self.last_path, self._started = self._started, None
            if trainer.is_global_zero:
                self._drop_old(Path(self.last_path).parent)

    def _drop_old(self, folder: Path) -> None:
        for old in sorted(folder.glob("step-*.ckpt"))[: -self.keep]:
            remove(old)

    @staticmethod
    def _write(trainer: Trainer, path: Path, options: dict[str, bool] | None = None) -> None:
        """Write a checkpoint, after what was logged: a run that goes on from it does not log that again."""
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(path, weights_only=False, storage_options=options)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def clear_for(folder: Path, step: int) -> None:
    """Make way for a run that goes on at `step`: later checkpoints, and damaged ones, step aside.

    They are of another course of the same run, and `last` would take the highest step for the newest.
    """
    later = [path for path in folder.glob("step-*.ckpt") if path.name > step_name(step)]
    others = [folder / name for name in (BEST, AVERAGE)]
    for path in [*later, *(path for path in others if path.exists() and not 0 <= (step_of(path) or -1) <= step)]:
        put_aside(path)


def _writing(trainer: Trainer) -> ShardWriting | None:
    return trainer.strategy.writing if isinstance(trainer.strategy, FullySharded) else None


def _average(last: int | None, best: int | None, monitor: str, sign: float) -> KeptWeights | None:
    """Return what keeps the weights to be averaged, None if nothing is asked for."""
    if last is not None and best is not None:
        raise UserError("checkpoint.average_last: and average_best are both given. Leave one of them out.")
    if last is not None:
        return KeptWeights(last, None)
    return None if best is None else KeptWeights(best, monitor, sign)
