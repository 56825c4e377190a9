"""Adafactor on shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanbert.optim.closures import with_gradients
from leanbert.shards import own, sum_over_shards


class Adafactor(torch.optim.Adafactor):
    """`torch.optim.Adafactor` (Shazeer and Stern 2018, arXiv 1804.04235), of sharded weights too, which torch's is not.

    Each device updates its rows; of each weight they exchange the sums over rows, one row of numbers, and three sums of
    squares. Settings are the same, and so is the state, where a weight's row factors are sharded as its rows are.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights; return the result of the closure."""
        if not any(isinstance(parameter, DTensor) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        result = with_gradients(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return result

    def _update(self, parameter: DTensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter] or self._begin(parameter)
        weights, slope = own(parameter), own(gradient)
        beta1_gap = float(state["step"].add_(1)) ** group["beta2_decay"]
        floor, least = group["eps"][0] or torch.finfo(weights.dtype).eps, group["eps"][1]
        rate = max(least, self._rms(weights, parameter)) * min(group["lr"], float(state["step"]) ** -0.5)
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        if parameter.ndim == 1:
            variance = own(state["variance"]).lerp_(slope.square(), beta1_gap).clone()
        else:
            columns = sum_over_shards(slope.square().sum(0, keepdim=True), parameter) / parameter.shape[0]
            rows = own(state["row_var"]).lerp_(slope.square().mean(1, keepdim=True), beta1_gap)
            mean = sum_over_shards(rows.sum(), parameter) / parameter.shape[0]
            variance = (rows @ state["col_var"].lerp_(columns, beta1_gap)).div_(mean.clamp_(min=floor))
        update = variance.clamp_(min=floor**2).rsqrt_().mul_(slope)
        weights.add_(update, alpha=-rate / max(1.0, self._rms(update, parameter) / group["d"]))

    def _begin(self, parameter: DTensor) -> dict[str, Any]:
        """Create the state of a parameter, as torch's."""
        if parameter.ndim > 2:
            raise NotImplementedError(f"a sharded weight of {parameter.ndim} dimensions")
        state = self.state[parameter]
        state["step"] = torch.tensor(0.0)
        if parameter.ndim == 1:
            state["variance"] = torch.zeros_like(parameter)
        else:
            state["row_var"] = torch.zeros_like(parameter[:, :1])
            state["col_var"] = own(parameter).new_zeros(1, parameter.shape[1])
        return state

    @staticmethod
    def _rms(part: Tensor, like: DTensor) -> float:
        """Return the root of the mean square of a tensor that is sharded as `like` is."""
        return float(sum_over_shards(part.square().sum(), like) / like.numel()) ** 0.5
