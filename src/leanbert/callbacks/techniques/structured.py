"""Pruning of whole heads, neurons and blocks, before or while a model trains."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from leanbert.callbacks.techniques.base import TechniqueCallback, has_gradients
from leanbert.callbacks.values import task_of
from leanbert.compression.structured import Importance, add_importance, prune_structured, sizes_kept, taylor_importance
from leanbert.errors import UserError, require, under
from leanbert.messages import say
from leanbert.ranges import COUNT, RATE, WHOLE, check_ranges
from leanbert.tasks.techniques import Techniques


class StructuredPruning(TechniqueCallback):
    """Remove the least important heads and feed-forward neurons, the same number in each block, or blocks. Approximate.

    Of encoder, decoder and cross-attention alike. The model becomes smaller: parameters, gradients, optimizer state,
    activations and time per step all fall. Prune a trained model (`model.init_from`) before the first step, or the
    model in training after `at_step`; then its optimizer's state is cut along. The finished checkpoint is an ordinary,
    smaller model.

    Args:
        heads: Share of each block's attention heads that leaves, from 0 to below 1.
        neurons: Share of each block's feed-forward neurons that leaves, from 0 to below 1.
        at_step: Optimizer steps before the removal; 0: when the model is built, after its weights were loaded.
        importance: weight: the norm of what a head or neuron can add, from its weights alone. taylor: by how much the
            loss would change, from gradients (Michel et al. 2019, arXiv 1905.10650), which needs `at_step` > 0.
        importance_steps: Steps before `at_step` whose gradients count (taylor only).
        blocks: Share of the encoder's blocks, and of the decoder's, that leaves, from 0 to below 1: evenly chosen ones,
            when the model is built.

    Raises:
        UserError: A setting is out of its range, or does not fit to another one.

    """

    def __init__(
        self,
        heads: float = 0.5,
        neurons: float = 0.5,
        at_step: int = 0,
        importance: Literal["weight", "taylor"] = "weight",
        importance_steps: int = 20,
        blocks: float = 0.0,
    ) -> None:
        name = "StructuredPruning"
        shares = dict.fromkeys(("heads", "neurons", "blocks"), RATE)
        check_ranges(name, locals(), {**shares, "at_step": WHOLE, "importance_steps": COUNT})
        require(heads + neurons + blocks > 0, f"{name}.heads: 0, as neurons and blocks: nothing leaves. Give a share.")
        require(not (blocks and at_step), f"{name}.blocks: leave when the model is built. Leave at_step out.")
        known = importance in ("weight", "taylor")
        require(known, f"{name}.importance: {importance!r} is unknown. Choose weight or taylor.")
        possible = importance == "weight" or at_step > 0
        hint = "Set at_step, or choose weight."
        require(possible, f"{name}.importance: taylor needs gradients, but at_step is 0. {hint}")
        self.heads, self.neurons, self.blocks, self.at_step = heads, neurons, blocks, at_step
        self.importance, self.importance_steps = importance, importance_steps
        self.done = False
        self._scores: Importance | None = None  # summed over steps

    def state_dict(self) -> dict[str, Any]:
        """Return whether the model is pruned, and the importance so far."""
        return {"done": self.done, "scores": None if self._scores is None else list(self._scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both."""
        self.done, scores = state_dict["done"], state_dict["scores"]
        self._scores = None if scores is None else Importance(*scores)

    def register(self, techniques: Techniques) -> None:
        """Ask the task to prune what it builds, or tell when the model in training is pruned."""
        if self.at_step == 0:
            techniques.structured = (self.heads, self.neurons, self.blocks)
        techniques.removal_step = self.at_step
        if self.importance == "taylor":
            techniques.gradient_readers.add("StructuredPruning.importance: taylor")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register; raise UserError if the run ends too early."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.at_step and 0 < trainer.max_steps <= self.at_step:
            raise UserError(
                f"StructuredPruning.at_step: is {self.at_step}, but the run has {trainer.max_steps} steps. Give less, "
                "so that it can recover."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise UserError if the removal lies behind and has not been done."""
        if 0 < self.at_step <= trainer.global_step and not self.done:
            raise UserError(
                f"StructuredPruning.at_step: {self.at_step}, but the checkpoint is of step {trainer.global_step} and "
                "not pruned. Give a later step."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add this step's gradients to the importance; they are freed right after the step."""
        due = self.importance == "taylor" and 0 < self.at_step - trainer.global_step <= self.importance_steps
        if due and has_gradients(trainer, pl_module):
            self._scores = add_importance(self._scores, taylor_importance(task_of(pl_module).model))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Shrink model and optimizer state after step number `at_step`."""
        if self.done or trainer.global_step != self.at_step:
            return
        model = task_of(pl_module).model
        before, old = model.num_parameters, model.config
        with under("StructuredPruning.heads"):
            sizes = sizes_kept(old, self.heads, self.neurons)
        prune_structured(model, *sizes, importance=self._scores, optimizer=trainer.optimizers[0])
        self.done, self._scores = True, None
        say(
            f"step {self.at_step}: {sizes[0]} of {old.num_heads} heads and {sizes[1]:,} of {old.intermediate_size:,} "
            f"neurons stay in each block, {model.num_parameters:,} of {before:,} parameters"
        )
