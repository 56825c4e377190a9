"""Training with weights rounded as the exported file will have them."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.values import task_of
from leanbert.compression.rounding import ROUNDINGS, set_rounding
from leanbert.errors import UserError
from leanbert.ranges import WHOLE
from leanbert.tasks.techniques import Techniques


class QuantizationAwareTraining(TechniqueCallback):
    """Compute with weights rounded as `export --quantize` rounds them, in training and its validation. Approximate.

    So the model learns weights that lose less by rounding (Jacob et al. 2018, arXiv 1712.05877). What is stored and
    updated stays in full precision: checkpoints are those of any run, and what `validate` and `export` take. A rounded
    copy of each weight waits for its backward pass, as an activation does.

    Args:
        scheme: As of `export --quantize`: int8, int4, or int8_int4 (products in int8, embeddings in int4).
        start_step: Optimizer steps before the first rounded one.
        inputs: Round what products read too, as int8 does in each call; not of int4.

    Raises:
        UserError: A setting is unknown or out of its range.

    """

    def __init__(
        self, scheme: Literal["int8", "int4", "int8_int4"] = "int8", start_step: int = 0, inputs: bool = False
    ) -> None:
        self.scheme, self.start_step, self.inputs = scheme, start_step, inputs
        self._rounds = False
        WHOLE.check("QuantizationAwareTraining.start_step", start_step)
        if scheme not in ROUNDINGS:
            raise UserError(f"QuantizationAwareTraining.scheme: {scheme!r} is unknown. Choose {', '.join(ROUNDINGS)}.")
        if inputs and scheme == "int4":
            raise UserError("QuantizationAwareTraining.inputs: products of int4 read 32 bits. Leave it out.")

    def register(self, techniques: Techniques) -> None:
        """Tell that weights are rounded."""
        techniques.rounds = True

    def reach_peak(self) -> None:
        """Round."""
        self.start_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register; raise UserError if the run ends too early."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and 0 < trainer.max_steps <= self.start_step:
            raise UserError(
                f"QuantizationAwareTraining.start_step: {self.start_step} is after the last step. Give less."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Round from the step on."""
        if not self._rounds and trainer.global_step >= self.start_step:
            set_rounding(task_of(pl_module).model, self.scheme, self.inputs)
            self._rounds = True

    on_train_start = on_train_batch_start  # a resumed run validates as it was

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compute with the weights as they are."""
        if self._rounds:
            set_rounding(task_of(pl_module).model, None)
            self._rounds = False
