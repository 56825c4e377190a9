"""Pruning while a model trains: single weights, 2:4 patterns, or whole heads and neurons."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.values import log_values, task_of
from leanbert.compression.pruning import (
    apply_masks,
    cubic_sparsity,
    in_fours,
    make_masks,
    masks_of_zeros,
    prunable,
    sparsity_of,
)
from leanbert.compression.structured import Importance, prune_structured, sizes_kept, taylor_importance
from leanbert.errors import UserError, under
from leanbert.messages import say
from leanbert.ranges import COUNT, PART, RATE, WHOLE
from leanbert.tasks.techniques import Techniques

MASK_UPDATES = 20
"""Times that masks are made anew on the way to the final sparsity, where the settings do not say."""


class MagnitudePruning(TechniqueCallback):
    """Set the smallest weights of linear layers to zero, more of them step by step. Approximate.

    The share of zeros grows by the cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878), and holds after every
    step. Once zero, a weight stays zero. Norms and biases are never pruned. Checkpoints hold plain weights, whose
    zeros are the mask: a resumed run goes on with them.

    Training takes one byte a weight more, for the masks; the optimizer keeps its state of pruned weights, which still
    get gradients, and its updates of them are undone. What becomes smaller is the finished model, once compressed.

    Args:
        final_sparsity: Share of zeros at `end_step`, above 0 and below 1.
        scope: Compare weights of the whole model (global) or of each matrix (layer); 2:4 keeps the two largest of
            each four neighbours, half of the weights, all at once at `start_step`. Matrices whose inputs do not come
            in fours stay dense then, with a notice.
        start_step: Optimizer steps before the first weight goes; None: a tenth of the run.
        end_step: Step from which the final sparsity holds; None: after four fifths of the run.
        every_n_steps: Steps between two updates of the masks; None: 20 updates.
        include_embeddings: Prune the embeddings too; the token embedding is also the output matrix.

    Raises:
        UserError: A setting is out of its range, or nothing matches.

    """

    def __init__(
        self,
        final_sparsity: float = 0.5,
        scope: Literal["global", "layer", "2:4"] = "global",
        start_step: int | None = None,
        end_step: int | None = None,
        every_n_steps: int | None = None,
        include_embeddings: bool = False,
    ) -> None:
        _check_magnitude(final_sparsity, scope, start_step, end_step, every_n_steps)
        self.final_sparsity, self.scope, self.include_embeddings = final_sparsity, scope, include_embeddings
        self.start_step, self.end_step, self.every_n_steps = start_step, end_step, every_n_steps
        self.sparsity = 0.0  # of the masks
        self._weights: dict[str, nn.Parameter] = {}
        self._masks: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, float]:
        """Return the sparsity; the masks are the zeros among the weights."""
        return {"sparsity": self.sparsity}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Take over the sparsity."""
        self.sparsity = state_dict["sparsity"]

    def register(self, techniques: Techniques) -> None:
        """Tell that there are masks."""
        techniques.masks = True

    def reach_peak(self) -> None:
        """Have the final masks."""
        self.sparsity = self.final_sparsity

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register; raise UserError if the run ends too early."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for setting in ("start_step", "end_step"):
            if 0 < trainer.max_steps < (getattr(self, setting) or 0):
                raise UserError(
                    f"MagnitudePruning.{setting}: {getattr(self, setting)} is after the last step of the run. "
                    f"Give at most {trainer.max_steps}, or raise trainer.max_steps."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, and the masks of a resumed run; prune if that is due before the first step."""
        self._weights = self._matching(pl_module)
        if self.sparsity > 0.0:
            self._masks = masks_of_zeros(self._weights)
        self._advance(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Undo the update of pruned weights, and prune more of them when that is due."""
        apply_masks(self._weights, self._masks)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._advance(trainer) or trainer.global_step % every == 0:
            log_values(trainer, {"pruning/sparsity": sparsity_of(self._weights)})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the masks."""
        self._weights, self._masks = {}, {}

    def _matching(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        weights = prunable(task_of(pl_module).model, self.include_embeddings)
        if self.scope == "2:4":
            weights = in_fours(weights)
        if not weights:
            raise UserError(f"MagnitudePruning.scope: {self.scope} matches no weight of this model. Leave it out.")
        return weights

    def _advance(self, trainer: Trainer) -> bool:
        """Make the masks anew if the schedule asks for more zeros after this step; return whether it did."""
        step, (start, end, every) = trainer.global_step, self._span(int(trainer.estimated_stepping_batches))
        target = cubic_sparsity(step, start, end, self.final_sparsity)
        due = step >= end or (step >= start and (step - start) % every == 0)
        if not due or target <= self.sparsity:  # a resumed run that was made longer waits for its schedule
            return False
        self._masks = {}  # free them first
        self._masks = make_masks(self._weights, target, self.scope)
        apply_masks(self._weights, self._masks)
        self.sparsity = target
        return True

    def _span(self, total_steps: int) -> tuple[int, int, int]:
        """Return the first and last step of the schedule, and the steps between updates."""
        start = total_steps // 10 if self.start_step is None else self.start_step
        if self.scope == "2:4":
            return start, start, 1
        end = max(start, total_steps * 4 // 5) if self.end_step is None else self.end_step
        return start, end, self.every_n_steps or max(1, (end - start) // MASK_UPDATES)


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
        _check_structured(heads, neurons, blocks, at_step, importance, importance_steps)
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
        if self.importance == "taylor" and 0 < self.at_step - trainer.global_step <= self.importance_steps:
            scores = taylor_importance(task_of(pl_module).model)
            if self._scores is not None:
                scores = Importance(*(a.to(b.device) + b for a, b in zip(self._scores, scores, strict=True)))
            self._scores = scores

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


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_magnitude(final: float, scope: str, start: int | None, end: int | None, every: int | None) -> None:
    name, first = "MagnitudePruning", start or 0
    PART.check(f"{name}.final_sparsity", final)
    WHOLE.check(f"{name}.start_step", start)
    WHOLE.check(f"{name}.end_step", end)
    COUNT.check(f"{name}.every_n_steps", every)
    _require(scope in ("global", "layer", "2:4"), f"{name}.scope: {scope!r} is unknown. Choose global, layer or 2:4.")
    _require(end is None or end >= first, f"{name}.end_step: {end} is before start_step {first}. Give a later one.")
    if scope == "2:4":
        _require(final == 0.5, f"{name}.final_sparsity: {final}, but 2:4 leaves out half. Give 0.5.")
        for setting, value in (("end_step", end), ("every_n_steps", every)):
            _require(value is None, f"{name}.{setting}: 2:4 prunes once, at start_step. Leave it out.")


def _check_structured(
    heads: float, neurons: float, blocks: float, at_step: int, importance: str, importance_steps: int
) -> None:
    name = "StructuredPruning"
    RATE.check(f"{name}.heads", heads)
    RATE.check(f"{name}.neurons", neurons)
    RATE.check(f"{name}.blocks", blocks)
    WHOLE.check(f"{name}.at_step", at_step)
    COUNT.check(f"{name}.importance_steps", importance_steps)
    _require(heads + neurons + blocks > 0.0, f"{name}.heads: 0, as neurons and blocks: nothing leaves. Give a share.")
    _require(not (blocks and at_step), f"{name}.blocks: leave when the model is built. Leave at_step out.")
    known = importance in ("weight", "taylor")
    _require(known, f"{name}.importance: {importance!r} is unknown. Choose weight or taylor.")
    possible = importance == "weight" or at_step > 0
    _require(possible, f"{name}.importance: taylor needs gradients, but at_step is 0. Set at_step, or choose weight.")
