"""16-bit precision, from the start or from a step on."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.plugins.precision import Precision as FullPrecision

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.values import log_values
from leanbert.errors import UserError
from leanbert.ranges import WHOLE
from leanbert.tasks.techniques import Techniques


class Precision(TechniqueCallback):
    """Compute in 16 bits.

    Args:
        precision: `bf16-mixed`, `16-mixed` (with loss scaling): 16-bit products, float32 weights; `bf16-true`: weights
            in bfloat16, updated with stochastic rounding and without a float32 copy (all approximate).
        start_step: Step before which all is float32; the mixed kinds only.

    """

    def __init__(
        self, precision: Literal["bf16-mixed", "16-mixed", "bf16-true"] = "bf16-mixed", start_step: int = 0
    ) -> None:
        self.precision, self.start_step = precision, start_step
        WHOLE.check("Precision.start_step", start_step)
        if start_step and precision == "bf16-true":
            raise UserError(
                "Precision.start_step: the dtype of weights and optimizer state cannot change in a run. "
                "Use bf16-mixed, or leave start_step out."
            )

        self._scaler: dict[str, Any] = {}
        self._scaling: MixedPrecision | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of loss scaling, which Lightning cannot restore before the step is reached."""
        return {"scaler": self._scaling.state_dict() if self._scaling is not None else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scale that was found."""
        self._scaler = state_dict["scaler"]

    def register(self, techniques: Techniques) -> None:
        """Tell the precision."""
        techniques.precision = self.precision

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the precision before the model is built."""
        super().setup(trainer, pl_module, stage)
        if trainer.max_steps != -1 and stage == "fit" and self.start_step >= trainer.max_steps:
            raise UserError(f"Precision.start_step: {self.start_step} is after the last step. Give less.")
        later = stage == "fit" and self.start_step > 0
        trainer.strategy.precision_plugin = FullPrecision() if later else self._plugin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Switch when the step is due (or past, in a resumed run), and log."""
        due = trainer.global_step >= self.start_step
        if due and type(trainer.strategy.precision_plugin) is FullPrecision:
            trainer.strategy.precision_plugin = self._plugin(trainer)
        if trainer.global_step in (0, self.start_step):
            log_values(trainer, {"precision/bits": 16.0 if due else 32.0})

    def _plugin(self, trainer: Trainer) -> FullPrecision:
        if self.precision == "bf16-true":
            return HalfPrecision("bf16-true")
        self._scaling = MixedPrecision(self.precision, trainer.strategy.root_device.type)
        if self._scaler:
            self._scaling.load_state_dict(self._scaler)
        return self._scaling
