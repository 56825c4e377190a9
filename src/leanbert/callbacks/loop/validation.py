"""Validation before the first step and after the last."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class ValidateAtEnds(Callback):
    """Validate once before step 1 (logged at step 0) and once after the last step, if that has not happened yet."""

    def __init__(self) -> None:
        self.validated_step = -1

    def state_dict(self) -> dict[str, int]:
        """Return the step validated last."""
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over the step validated last."""
        self.validated_step = state_dict["validated_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the untrained model; in a resumed run what was due after its checkpoint was written."""
        step = trainer.global_step
        if step == 0 or (self.validated_step != step and _due(trainer)):
            run_validation(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what has been validated."""
        self.validated_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the trained model."""
        if self.validated_step != trainer.global_step:
            run_validation(trainer)


def _due(trainer: Trainer) -> bool:
    """Return whether a validation falls on the current step; Lightning leaves it out when it resumes there."""
    every, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not isinstance(every, int):  # no number of batches, where an epoch has no end
        return False
    if epochs is None:
        return trainer.global_step % max(1, every) == 0
    epoch, batch = divmod(trainer.global_step - 1, int(trainer.num_training_batches))
    return (epoch + 1) % epochs == 0 and (batch + 1) % max(1, every) == 0


def run_validation(trainer: Trainer) -> None:
    """Run the validation loop from within training, as Lightning's own training loop does."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.limit_val_batches == 0:
        return
    loop.restarting = False  # a resumed loop would go on in the middle of the validation before
    trainer.validating = True
    first_iteration = trainer._logger_connector._first_loop_iter
    loop.run()
    trainer._logger_connector._first_loop_iter = first_iteration
    trainer.training = True
