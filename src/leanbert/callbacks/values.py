"""Values of a run for its loggers."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Give values by tag to all loggers, at the number of completed steps."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=trainer.global_step)
