"""Pruning of single weights, patterns or blocks of weights while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from leanbert.callbacks.techniques.base import TechniqueCallback, has_gradients
from leanbert.callbacks.values import log_values, task_of
from leanbert.compression.pruning import (
    PATTERNS,
    SCOPES,
    Scope,
    add_movement,
    apply_masks,
    cubic_sparsity,
    make_masks,
    masks_of_zeros,
    prunable,
    sparsity_of,
    tiled,
)
from leanbert.distributed.state import shard_like
from leanbert.errors import UserError, require
from leanbert.measure.trace import phase
from leanbert.ranges import COUNT, PART, WHOLE, check_ranges
from leanbert.shards import own, own_rows
from leanbert.tasks.techniques import Techniques

MASK_UPDATES = 20
"""Times that masks are made anew on the way to the final sparsity, where the settings do not say."""


class WeightPruning(TechniqueCallback):
    """Set weights of linear layers to zero, more of them step by step; subclasses say which. Approximate.

    The share of zeros grows by the cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878), and holds after every
    step. Once zero, a weight stays zero. Norms and biases are never pruned. Checkpoints hold plain weights, whose
    zeros are the mask: a resumed run goes on with them.

    Training takes one byte a weight more, for the masks; the optimizer keeps its state of pruned weights, which still
    get gradients, and its updates of them are undone. What becomes smaller is the finished model, once compressed.

    Args:
        final_sparsity: Share of zeros at `end_step`, above 0 and below 1.
        scope: Compare weights of the whole model (global) or of each matrix (layer); 2:4 keeps two of each four
            neighbours and 4:8 four of eight, half of the weights, all at once at `start_step`.
        start_step: Optimizer steps before the first weight goes; None: a tenth of the run.
        end_step: Step from which the final sparsity holds; None: after four fifths of the run.
        every_n_steps: Steps between two updates of the masks; None: 20 updates.
        include_embeddings: Prune the embeddings too; the token embedding is also the output matrix.
        block_size: Rows and columns of the square blocks whose weights leave together. Matrices that do not consist
            of whole blocks, or groups of a pattern, stay dense, with a notice.

    Raises:
        UserError: A setting is out of its range, or nothing matches.

    """

    FIRST_STEP: ClassVar[int] = 0
    """Optimizer steps before there is something to compare weights by."""

    def __init__(
        self,
        final_sparsity: float = 0.5,
        scope: Scope = "global",
        start_step: int | None = None,
        end_step: int | None = None,
        every_n_steps: int | None = None,
        include_embeddings: bool = False,
        block_size: int = 1,
    ) -> None:
        self.final_sparsity, self.scope, self.include_embeddings = final_sparsity, scope, include_embeddings
        self.start_step, self.end_step, self.every_n_steps = start_step, end_step, every_n_steps
        self.block_size = block_size
        self._check()
        self.sparsity = 0.0  # of the masks
        self._weights: dict[str, nn.Parameter] = {}
        self._masks: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsity; the masks are the zeros among the weights."""
        return {"sparsity": self.sparsity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the sparsity."""
        self.sparsity = state_dict["sparsity"]

    def register(self, techniques: Techniques) -> None:
        """Tell that there are masks."""
        techniques.masks.add(self._name)

    def reach_peak(self) -> None:
        """Have the final masks."""
        self.sparsity = self.final_sparsity

    def tensors(self) -> Iterable[Tensor]:
        """Return the masks."""
        return self._masks.values()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register; raise UserError if the run ends too early."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        for setting in ("start_step", "end_step"):
            if 0 < trainer.max_steps < (getattr(self, setting) or 0):
                raise UserError(
                    f"{self._name}.{setting}: {getattr(self, setting)} is after the last step of the run. "
                    f"Give at most {trainer.max_steps}, or raise trainer.max_steps."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights, and the masks of a resumed run; prune if that is due before the first step."""
        self._weights = self._matching(pl_module)
        self._prepare()
        self._masks = self._stored_masks() if self.sparsity > 0.0 else {}
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

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _prepare(self) -> None:
        """Make what masks are chosen by besides the weights; by default nothing."""

    def _choose(self, sparsity: float) -> dict[str, Tensor]:
        """Return masks of this sparsity."""
        raise NotImplementedError

    def _stored_masks(self) -> dict[str, Tensor]:
        """Return the masks that a checkpoint has left."""
        return masks_of_zeros(self._weights)

    def _matching(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        weights = prunable(task_of(pl_module).model, self.include_embeddings)
        weights = tiled(weights, self.scope, self.block_size)
        if not weights:
            setting, value = ("block_size", self.block_size) if self.block_size > 1 else ("scope", self.scope)
            raise UserError(f"{self._name}.{setting}: {value} matches no weight of this model. Leave it out.")
        cut = [name for name, weight in weights.items() if own_rows(weight) % self.block_size]
        if cut:
            raise UserError(
                f"{self._name}.block_size: {self.block_size} rows of {cut[0]} are not on one device, of "
                f"{own_rows(weights[cut[0]])} each. Give a divisor, or use ddp."
            )
        return weights

    def _advance(self, trainer: Trainer) -> bool:
        """Make the masks anew if the schedule asks for more zeros after this step; return whether it did."""
        step, (start, end, every) = trainer.global_step, self._span(int(trainer.estimated_stepping_batches))
        target = cubic_sparsity(step, start, end, self.final_sparsity)
        due = step >= end or (step >= start and (step - start) % every == 0)
        if not due or target <= self.sparsity:  # a resumed run that was made longer waits for its schedule
            return False
        self._masks = {}  # free them first
        self._masks = self._choose(target)
        apply_masks(self._weights, self._masks)
        self.sparsity = target
        return True

    def _span(self, total_steps: int) -> tuple[int, int, int]:
        """Return the first and last step of the schedule, and the steps between updates."""
        start = max(self.FIRST_STEP, total_steps // 10) if self.start_step is None else self.start_step
        if self.scope in PATTERNS:
            return start, start, 1
        end = max(start, total_steps * 4 // 5) if self.end_step is None else self.end_step
        return start, end, self.every_n_steps or max(1, (end - start) // MASK_UPDATES)

    def _check(self) -> None:
        name, start, end, first = self._name, self.start_step, self.end_step, self.start_step or 0
        steps = {"start_step": WHOLE, "end_step": WHOLE, "every_n_steps": COUNT}
        check_ranges(name, vars(self), {"final_sparsity": PART, **steps, "block_size": COUNT})
        known = ", ".join(SCOPES)
        require(self.scope in SCOPES, f"{name}.scope: {self.scope!r} is unknown. Choose one of {known}.")
        require(end is None or end >= first, f"{name}.end_step: {end} is before start_step {first}. Give a later one.")
        early = start is not None and start < self.FIRST_STEP
        require(
            not early, f"{name}.start_step: {start}, but importance is of gradients. Give {self.FIRST_STEP} or more."
        )
        if self.scope in PATTERNS:
            half = f"{self.final_sparsity}, but {self.scope} leaves out half. Give 0.5."
            once = f"{self.scope} prunes once, at start_step. Leave it out."
            require(self.final_sparsity == 0.5, f"{name}.final_sparsity: {half}")
            require(end is None, f"{name}.end_step: {once}")
            require(self.every_n_steps is None, f"{name}.every_n_steps: {once}")
            require(self.block_size == 1, f"{name}.block_size: {self.scope} is of single weights. Leave it out.")


class MagnitudePruning(WeightPruning):
    """Prune the weights with the smallest magnitudes, or the blocks with the smallest norms; see `WeightPruning`."""

    def _choose(self, sparsity: float) -> dict[str, Tensor]:
        return make_masks(self._weights, sparsity, self.scope, self.block_size)


class MovementPruning(WeightPruning):
    """Prune the weights that move towards zero while they train, however large they are; see `WeightPruning`.

    For models that were trained on other data before: what counts is what the new task changes. The importance of a
    weight is minus its product with its gradient, summed over all steps so far (Sanh, Wolf and Rush 2020, arXiv
    2005.07683); of a block it is the sum. The gradient is that of the whole batch, before it is clipped. In the paper
    weights may come back; here they never do.

    Training takes four bytes a weight more than `MagnitudePruning`, for the importance, which is in checkpoints too.
    """

    FIRST_STEP = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scores: dict[str, Tensor] = {}  # float32; of pruned weights -inf

    def state_dict(self) -> dict[str, Any]:
        """Return the sparsity and the importance."""
        return {**super().state_dict(), "scores": dict(self._scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over both."""
        super().load_state_dict(state_dict)
        self._scores = state_dict["scores"]

    def register(self, techniques: Techniques) -> None:
        """Tell that there are masks, and that gradients have to be there at the end of a step."""
        super().register(techniques)
        techniques.gradient_readers.add(self._name)

    def tensors(self) -> Iterable[Tensor]:
        """Return masks and importance."""
        return chain(super().tensors(), map(own, self._scores.values()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add this step's part to the importance."""
        if has_gradients(trainer, pl_module):
            with phase("optimizer"):
                add_movement(self._scores, self._weights)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free masks and importance."""
        super().teardown(trainer, pl_module, stage)
        self._scores = {}

    def _prepare(self) -> None:
        stored, self._scores = self._scores, {}
        for name, weight in self._weights.items():
            self._scores[name] = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
            if name in stored:
                self._scores[name].copy_(shard_like(stored[name], weight))

    def _stored_masks(self) -> dict[str, Tensor]:
        return {name: own(scores) > -torch.inf for name, scores in self._scores.items()}

    def _choose(self, sparsity: float) -> dict[str, Tensor]:
        masks = make_masks(self._scores, sparsity, self.scope, self.block_size, signed=True)
        for name, mask in masks.items():
            own(self._scores[name]).masked_fill_(~mask, -torch.inf)
        return masks
