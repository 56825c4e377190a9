"""What a callback that changes the memory of a step is asked."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

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
