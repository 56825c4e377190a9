"""What a callback that changes the memory of a step is asked."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from leanbert.callbacks.values import task_of
from leanbert.tasks.techniques import Techniques


class TechniqueCallback(Callback):
    """A thin toggle over a technique; it takes part in the dry runs of a plan, as no other callback does."""

    def register(self, techniques: Techniques) -> None:
        """Write what is asked for into `techniques`; by default nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register where the model is trained, before it is built."""
        if stage == "fit":
            self.register(task_of(pl_module).techniques)

    def reach_peak(self) -> None:
        """Be as in the step of a run that needs most memory, for that is the one a dry run takes."""

    def tensors(self) -> Iterable[Tensor]:
        """Return what is kept beside the model while it trains, once `on_train_start` has run; by default nothing."""
        return ()


def has_gradients(trainer: Trainer, module: LightningModule) -> bool:
    """Return whether the update of a step, whose passes are over, has gradients to use.

    A step that is not finite has none, but where a scaler looks for its scale: there it leaves out the update.
    """
    gradients = [weight.grad for weight in task_of(module).model.parameters() if weight.grad is not None]
    if not gradients or getattr(trainer.precision_plugin, "scaler", None) is None:
        return bool(gradients)
    return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
