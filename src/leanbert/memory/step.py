"""One optimizer step, in plain torch: everything that trains is built on this file.

A task supplies two functions, `count_targets(batch)` and `loss_sum(micro_batch)`; a batch supplies
`split(micro_batch)`. The loss of a step is the sum over all targets of the whole effective batch (all
micro-batches, all ranks) divided by their number, so the size of the micro-batch never changes training:
a mean of means would weight the tokens of micro-batches with few targets more.

Nothing here reads a value back from a tensor, so a step runs unchanged under `FakeTensorMode`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch", bound="SplittableBatch")
MicroBatch = TypeVar("MicroBatch", contravariant=True)


class SplittableBatch(Protocol):
    """A batch of sequences that can be cut along its first dimension."""

    def __len__(self) -> int:
        """Return the number of sequences."""
        ...

    def split(self: Batch, micro_batch: int) -> Sequence[Batch]:
        """Return consecutive views of at most `micro_batch` sequences."""
        ...


class StepTask(Protocol[MicroBatch]):
    """What a task supplies to be trained."""

    def count_targets(self, batch: MicroBatch) -> Tensor:
        """Return the number of targets as a tensor of shape []."""
        ...

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Return the loss summed over the targets, a tensor of shape [] with a gradient."""
        ...


def backpropagate_all_but_last(
    task: StepTask[Batch],
    batch: Batch,
    *,
    micro_batch: int | None = None,
    world_size: int = 1,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    backward: Callable[[Tensor], object] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
    seed_micro_batch: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the forward passes of a step and the backward passes of all micro-batches but the last.

    The caller back-propagates the returned loss (Lightning does so by itself; there gradients synchronise).

    Args:
        task: Supplies the number of targets and the summed loss.
        batch: This rank's share of the effective batch.
        micro_batch: Sequences of one forward pass; None: the whole batch.
        world_size: Ranks over which gradients are averaged.
        sum_over_ranks: Sums a tensor of shape [] over the ranks; needed when `world_size` is not 1.
        backward: Back-propagates a loss of shape [] into gradients that accumulate.
        no_sync: Context in which a backward pass does not exchange gradients between ranks.
        seed_micro_batch: Called with the index of each micro-batch before its forward pass, so that dropout is a
            function of position and a replay draws the same numbers.

    Returns:
        The scaled loss of the last micro-batch, shape [], still to be back-propagated; and this rank's part of the
        loss of the whole effective batch, shape [], detached (the sum over ranks of it is the loss).

    """
    count = task.count_targets(batch)
    if sum_over_ranks is not None:
        count = sum_over_ranks(count)
    parts = batch.split(micro_batch or len(batch))
    total = torch.zeros((), device=count.device)
    for index, part in enumerate(parts):
        if seed_micro_batch is not None:
            seed_micro_batch(index)
        last = index == len(parts) - 1
        with nullcontext() if last else no_sync():
            loss = task.loss_sum(part) / count
            total = total + loss.detach()
            scaled = loss * world_size  # gradients are averaged over ranks, the loss is a sum over ranks
            if not last:
                backward(scaled)
    return scaled, total


def optimizer_step(task: StepTask[Batch], batch: Batch, optimizer: torch.optim.Optimizer, **options: Any) -> Tensor:
    """Train on one effective batch: all forward and backward passes, the update, gradients freed.

    See `backpropagate_all_but_last` for the `options`. Returns this rank's part of the loss, shape [], detached.
    """
    last, total = backpropagate_all_but_last(task, batch, **options)
    last.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # after the step: the next forward pass has no use for them
    return total


def seed_position(*position: int) -> None:
    """Seed torch's generators from a position such as (seed, step, rank, micro-batch)."""
    torch.manual_seed(mix_position(*position))


def mix_position(*position: int) -> int:
    """Return a seed, 0 to 2^63 - 1, that is a function of the position; neighbouring ones are unrelated.

    The integers are mixed by splitmix64 (Steele et al., OOPSLA 2014).
    """
    state = 0
    for part in position:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1  # torch's seeds are signed 64-bit integers
