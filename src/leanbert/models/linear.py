"""Linear layers that compute with rounded numbers where they are told to: a switch for quantization-aware training."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Rounding = Callable[[Tensor], Tensor]
"""Returns a tensor of the same shape and dtype with rounded numbers, whose gradient is passed on."""


def rounded(x: Tensor, rounding: Rounding | None) -> Tensor:
    """Return `x`, rounded if there is a rounding."""
    return x if rounding is None else rounding(x)


class Linear(nn.Linear):
    """A linear layer that owns the switches of its rounding; the weights that it stores stay as they are."""

    round_weight: Rounding | None = None
    round_input: Rounding | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Multiply [..., n] with the matrix [m, n]: [..., m]."""
        return F.linear(rounded(input, self.round_input), rounded(self.weight, self.round_weight), self.bias)
