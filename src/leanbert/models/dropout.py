"""Dropout that is cheap where random numbers are drawn one after another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero elements of `x` with probability `rate` and scale the rest by `1 / (1 - rate)`.

    `x` may have any shape and floating dtype; shape and dtype stay.
    """
    return F.dropout(x, rate, training) if training and rate > 0.0 else x
