"""Updates inside the backward pass: a gradient lives from its last contribution to its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from leanbert.optim.build import CombinedOptimizer, trainable

Guard = Callable[[Iterable[Tensor]], None]
"""Is given each parameter before its gradient is used, and may take it away."""


def let_all_through(parameters: Iterable[Tensor]) -> None:
    """Guard nothing."""


def update_in_backward(model: nn.Module, optimizer: CombinedOptimizer, guard: Guard = let_all_through) -> None:
    """Update each parameter as soon as its gradient is whole, and free the gradient.

    Exact with one backward pass a step; `optimizer.step` then finds nothing left to do. A tied weight's gradient is
    whole when all its uses have contributed. Source: Lv et al. 2023 (LOMO, arXiv 2306.09782), with any optimizer.
    """
    for parameter in trainable(model.parameters()):
        parameter.register_post_accumulate_grad_hook(_updating(optimizer, guard))


def _updating(optimizer: CombinedOptimizer, guard: Guard) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        guard([parameter])
        if parameter.grad is not None:
            optimizer.update(parameter)
        parameter.grad = None

    return hook


def accumulate_in_backward(
    model: nn.Module,
    optimizer: CombinedOptimizer,
    place: Callable[[], tuple[int, int]],
    guard: Guard = let_all_through,
) -> None:
    """Fold each micro-batch's gradient into Adam's moments and free it; update after the last one.

    Adam Accumulation (Zhang et al. 2023, arXiv 2305.19982). Approximate: the second moment sums the squares of the
    micro-batches' gradients, not the square of their sum. `place` returns the index of the current micro-batch and
    the number of micro-batches of the step.
    """
    for parameter in trainable(model.parameters()):
        parameter.register_post_accumulate_grad_hook(_accumulating(optimizer, place, guard))


def _accumulating(
    optimizer: CombinedOptimizer, place: Callable[[], tuple[int, int]], guard: Guard
) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        index, count = place()
        guard([parameter])
        if parameter.grad is not None:
            optimizer.accumulate(parameter, first=index == 0, last=index == count - 1)
        parameter.grad = None

    return hook
