"""Updates inside the backward pass."""

from __future__ import annotations

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.tasks.techniques import Techniques


class OptimizerInBackward(TechniqueCallback):
    """Update each parameter as soon as its gradient is whole, and free the gradient.

    Exact with one micro-batch, and with LayerMajor. With GradientAccumulation set `accumulate`.

    Args:
        accumulate: Fold each micro-batch's gradient into Adam's moments (AdamA, arXiv 2305.19982; approximate).

    """

    def __init__(self, accumulate: bool = False) -> None:
        self.accumulate = accumulate

    def register(self, techniques: Techniques) -> None:
        """Ask for updates in the backward pass."""
        techniques.in_backward = "accumulate" if self.accumulate else "update"
