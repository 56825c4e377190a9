"""Muon on processors without 16-bit matrix products, and on shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanbert.measure.target import target_type
from leanbert.memory.precision import has_16_bit_products
from leanbert.optim.closures import with_gradients
from leanbert.shards import map_whole, own, shards_of
from leanbert.slices import parts


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose Newton-Schulz iteration is in float32 on a CPU without 16-bit matrix products.

    torch does it in bfloat16 always, and there such a product was measured to take 100 times as long as in float32: an
    update took longer than all else in a step. State and settings are the same.

    Of sharded weights each rank has its part of the momentum. As many at a time as there are ranks are gathered, each
    on one rank, which iterates on it and hands the parts out again: torch's own would exchange the factors of each
    product.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights; return the result of the closure."""
        first = self.param_groups[0]["params"][0]
        fast = has_16_bit_products(target_type(first))
        if fast and not isinstance(first, DTensor):
            return super().step(closure)
        result = with_gradients(closure)
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            given.sort(key=torch.Tensor.numel)  # ranks have like work at a time
            for part in parts(len(given), shards_of(first)):
                self._update(given[part], group, torch.bfloat16 if fast else first.dtype)
        return result

    def _update(self, parameters: list[Tensor], group: dict[str, Any], dtype: torch.dtype) -> None:
        """Update weights, of sharded ones at most as many as there are ranks."""

        def iterate(matrix: Tensor) -> Tensor:
            return orthogonal(matrix.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])

        directions = [self._nesterov(parameter, group["momentum"]) for parameter in parameters]
        sharded = isinstance(directions[0], DTensor)
        updates = map_whole(iterate, directions, dtype) if sharded else map(iterate, directions)
        for parameter, update in zip(parameters, updates, strict=True):
            rate = group["lr"] * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
            own(parameter).mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        """Take the gradient into the momentum, and return what is to be made orthogonal."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Return `matrix` [M, N] with its singular values brought near 1, by a quintic Newton-Schulz iteration.

    Jordan et al. 2024 (Muon), as in `torch.optim.Muon`.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
