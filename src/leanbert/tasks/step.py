"""An optimizer step under Lightning, which back-propagates the last micro-batch and calls the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from leanbert.data.batches.batch import Batch
from leanbert.data.module import RowData
from leanbert.distributed.parallelize import unreduced
from leanbert.memory.finite import StepCheck
from leanbert.memory.recovery import agree, retry_smaller
from leanbert.memory.step import StepTask, backpropagate_all_but_last, seed_position
from leanbert.models.base import EncoderModel
from leanbert.optim.build import trainable
from leanbert.tasks.techniques import Techniques

B = TypeVar("B", bound=Batch)


@dataclass
class StepState:
    """What changes from step to step and inside a step; callbacks say how large a micro-batch may be."""

    wanted_micro_batch: int | None = None
    """Sequences of one forward pass on each device that the settings ask for; None: all."""
    largest_micro_batch: int | None = None
    """Sequences that fit, once memory has run out."""
    shrink: Callable[[BaseException], bool] = lambda error: False
    """Makes micro-batches smaller when memory has run out; False: it cannot."""
    rows: int = 0
    """Sequences of the step on this device."""
    index: int = 0
    """Number of the current micro-batch, from 0."""
    check: StepCheck = field(default_factory=StepCheck)

    @property
    def micro_batch(self) -> int | None:
        """Sequences of one forward pass on each device: what is wanted, as far as it fits; None: all."""
        bounds = [rows for rows in (self.wanted_micro_batch, self.largest_micro_batch) if rows is not None]
        return min(bounds, default=None)

    @property
    def position(self) -> tuple[int, int]:
        """Number of the current micro-batch, and of all micro-batches of the step."""
        return self.index, -(-self.rows // (self.micro_batch or self.rows))


class SteppedModule(LightningModule, Generic[B]):
    """A LightningModule that is trained by the steps of `leanbert.memory.step`; `B` is what its batches are."""

    model: EncoderModel
    techniques: Techniques
    step_state: StepState
    seed: int
    offloads = False
    """Whether shards are in host memory."""

    def count_targets(self, batch: B) -> Tensor:
        """Return the number of targets, shape []."""
        raise NotImplementedError

    def loss_sum(self, batch: B) -> Tensor:
        """Return the loss summed over targets, shape []."""
        raise NotImplementedError

    @property
    def objective(self) -> StepTask[B]:
        """What is minimised."""
        return self

    @property
    def _data(self) -> RowData:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def training_step(self, batch: B, batch_idx: int) -> dict[str, Any]:
        """Run a step up to the last backward pass, which Lightning does."""
        strategy, state = self.trainer.strategy, self.step_state
        world_size = self.trainer.world_size
        parallel = strategy if isinstance(strategy, ParallelStrategy) and world_size > 1 else None

        def attempt() -> tuple[Tensor, Tensor]:
            state.check.reset()
            return backpropagate_all_but_last(
                self.objective,
                batch,
                micro_batch=state.micro_batch,
                world_size=world_size,
                sum_over_ranks=self.sum_over_ranks if parallel else None,
                backward=lambda part: strategy.backward(part, None),
                no_sync=self._no_sync,
                seed_micro_batch=self._start_micro_batch,
            )

        state.rows = len(batch)
        if parallel and self.techniques.recovery:  # all ranks agree before the pass that exchanges gradients
            last, loss = retry_smaller(lambda: agree(attempt, self._any_rank), self._undo_and_shrink)
        else:
            last, loss = attempt()
        loss = state.check.loss = self.sum_over_ranks(loss) if parallel else loss
        # the last group is AdamW's where Muon has its own
        rate = float(self.trainer.optimizers[0].param_groups[-1]["lr"])
        return {"loss": last, "step_loss": loss, "learning_rate": rate}

    @property
    def reduces_each(self) -> bool:
        """Whether each backward pass exchanges gradients: it uses them up (AdamA), or hands them over to the host."""
        return self.techniques.in_backward is not None or self.offloads

    def _no_sync(self) -> AbstractContextManager[object]:
        """Return a context whose backward passes do not exchange gradients; a later one exchanges their sum.

        Where `reduces_each`, they do.
        """
        if self.reduces_each:
            return nullcontext()
        if isinstance(self.model, FSDPModule):
            return unreduced(self)
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def precision_of_steps(self) -> AbstractContextManager[object]:
        """Return a context for passes outside of steps: sharded weights always come in the precision of a step."""
        sharded = isinstance(self.model, FSDPModule)
        return self.trainer.precision_plugin.val_step_context() if sharded else nullcontext()

    def _start_micro_batch(self, index: int) -> None:
        self.step_state.index = index
        seed_position(self.seed, self.global_step, self.global_rank, index)

    def _any_rank(self, failed: bool) -> bool:
        return bool(self.sum_over_ranks(torch.tensor(float(failed), device=self.device)) > 0)

    def _undo_and_shrink(self, error: BaseException) -> bool:
        self.zero_grad(set_to_none=True)
        return self.step_state.shrink(error)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor of shape [] over all ranks."""
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: Lightning calls this between forward and backward, where micro-batches have left gradients."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update, then free the gradients: the next forward pass has no use for them.

        There is no update where loss or gradients are not finite. When memory runs out and recovery is on, the whole
        closure (forward and backward passes) is run again.
        """
        closure = optimizer_closure
        if closure is not None and self.techniques.recovery and self.trainer.world_size == 1:
            closure = partial(retry_smaller, closure, self._undo_and_shrink)
        if closure is not None:
            closure = partial(self._checked, closure)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad(set_to_none=True)
        self._data.samples_consumed += self.step_state.rows * self.trainer.world_size

    def _checked(self, closure: Callable[[], Any]) -> Any:
        """Run the passes of a step, and look at what they have left."""
        result = closure()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        parameters = trainable(self.parameters())
        if scaler is None:
            shards = isinstance(self.model, FSDPModule)  # whole gradients are the same on all ranks
            self.step_state.check.guard(parameters, self.sum_over_ranks if shards else None)
        elif scaler.get_scale() <= 1.0:  # above, gradients overflow while the scale is found, and the scaler leaves out
            self.step_state.check.look(parameters)
        return result
