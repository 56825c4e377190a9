"""Muon on processors without 16-bit matrix products, and on shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from leanbert.measure.target import target_type
from leanbert.memory.precision import has_16_bit_products


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose Newton-Schulz iteration is in float32 on a CPU without 16-bit matrix products.

    torch does it in bfloat16 always, and there such a product was measured to take 100 times as long as in float32: an
    update took longer than all else in a step. State and settings are the same.

    Of sharded weights each rank has its part of the momentum. It gathers the updates one by one, iterates on each
    whole, and takes its part: torch's own would exchange the factors of each product.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights; return the result of the closure."""
        first = self.param_groups[0]["params"][0]
        fast = has_16_bit_products(target_type(first))
        if fast and not isinstance(first, DTensor):
            return super().step(closure)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, torch.bfloat16 if fast else parameter.dtype)
        return result

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], dtype: torch.dtype) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        moved = gradient.lerp(average, group["momentum"])
        whole = moved.full_tensor() if isinstance(moved, DTensor) else moved
        update = orthogonal(whole.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"])
        if isinstance(moved, DTensor):
            update = distribute_tensor(update, moved.device_mesh, moved.placements, src_data_rank=None)
        rate = group["lr"] * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


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
