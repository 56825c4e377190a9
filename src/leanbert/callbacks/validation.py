"""Validation before the first step and after the last."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class ValidateAtEnds(Callback):
    """Validate once before step 1 (logged at step 0) and once after the last step, if that has not happened yet."""

    def __init__(self) -> None:
        self.validated_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the untrained model; a resumed run has done so."""
        if trainer.global_step == 0:
            _validate(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what has been validated."""
        self.validated_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the trained model."""
        if self.validated_step != trainer.global_step:
            _validate(trainer)


def _validate(trainer: Trainer) -> None:
    """Run the validation loop from within training, as Lightning's own training loop does."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.limit_val_batches == 0:
        return
    trainer.validating = True
    first_iteration = trainer._logger_connector._first_loop_iter
    loop.run()
    trainer._logger_connector._first_loop_iter = first_iteration
    trainer.training = True
