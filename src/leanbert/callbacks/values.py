"""Values of a run for its loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def log_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give values by tag to all loggers, at the number of completed steps."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)


def tensorboard_writers(trainer: Trainer) -> list[Any]:
    """Return the `SummaryWriter`s of the run's TensorBoard loggers; none but on the first rank."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
