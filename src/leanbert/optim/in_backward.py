"""Updates inside the backward pass: a gradient lives from its last contribution to its update."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from leanbert.optim.build import CombinedOptimizer, trainable

Guard = Callable[[Iterable[Tensor]], None]
"""Is given each parameter before its gradient is used, and may take it away."""


def update_in_backward(model: nn.Module, optimizer: CombinedOptimizer, guard: Guard) -> None:
    """Update each parameter as soon as its gradient is whole, and free the gradient.

    Exact with one backward pass a step; `optimizer.step` then finds nothing left to do. A tied weight's gradient is
    whole when all its uses have contributed. Source: Lv et al. 2023 (LOMO, arXiv 2306.09782), with any optimizer.
    """
    _use_gradients(model, optimizer.update, guard)


def accumulate_in_backward(
    model: nn.Module, optimizer: CombinedOptimizer, position: Callable[[], tuple[int, int]], guard: Guard
) -> None:
    """Fold each micro-batch's gradient into Adam's moments and free it; update after the last one.

    Adam Accumulation (Zhang et al. 2023, arXiv 2305.19982). Approximate: the second moment sums the squares of the
    micro-batches' gradients, not the square of their sum. `position` returns the index of the current micro-batch and
    the number of micro-batches of the step.
    """

    def fold(parameter: Tensor) -> None:
        index, count = position()
        optimizer.accumulate(parameter, first=index == 0, last=index == count - 1)

    _use_gradients(model, fold, guard)


def _use_gradients(model: nn.Module, use: Callable[[Tensor], None], guard: Guard) -> None:
    def hook(parameter: Tensor) -> None:
        guard([parameter])
        if parameter.grad is not None:
            use(parameter)
        parameter.grad = None

    for parameter in trainable(model.parameters()):
        parameter.register_post_accumulate_grad_hook(hook)
