"""Updates inside the backward pass."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback


class OptimizerInBackward(Callback):
    """Update each parameter as soon as its gradient is whole, and free the gradient.

    Exact with one micro-batch, and with LayerMajor. With GradientAccumulation set `accumulate`.

    Args:
        accumulate: Fold each micro-batch's gradient into Adam's moments (AdamA, arXiv 2305.19982; approximate).

    """

    def __init__(self, accumulate: bool = False) -> None:
        self.accumulate = accumulate

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Register."""
        if stage == "fit":
            pl_module.techniques.in_backward = "accumulate" if self.accumulate else "update"
