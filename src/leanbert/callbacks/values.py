"""What callbacks ask of a run, and values for its loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from leanbert.data.module import RowData
from leanbert.tasks.base import Task

Kind = TypeVar("Kind", bound=Callback)


def task_of(module: LightningModule) -> Task:
    """Return the module, which is a task in every run of ours."""
    return module  # type: ignore[return-value]


def data_of(trainer: Trainer) -> RowData:
    """Return the data module of a run."""
    return trainer.datamodule  # type: ignore[attr-defined]


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """Return the callbacks of a run that are of a kind, in their order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def rows_per_device(trainer: Trainer) -> int:
    """Return the sequences of a step on each device."""
    return int(data_of(trainer).hparams["batch_size"]) // trainer.world_size


def log_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give values by tag to all loggers, at the number of completed steps."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """Return the `SummaryWriter`s of the run's TensorBoard loggers; none but on the first rank."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
