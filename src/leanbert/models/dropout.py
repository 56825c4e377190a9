"""Dropout that is cheap on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leanbert.measure.target import target_type


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero elements of `x` with probability `rate` and scale the rest by `1 / (1 - rate)`.

    `x` may have any shape and floating dtype; both stay. `rate` is met to 1/65536. Draws from torch's global
    generator, on the CPU in an order that does not depend on the number of threads.
    """
    if not training or rate == 0.0:
        return x
    if target_type(x) == "cuda":
        return torch.native_dropout(x, rate, True)[0]  # what `F.dropout` calls there, said also where nothing is there
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    return (x * keep_mask(x, rate)).mul_(1.0 / (1.0 - rate))


def keep_mask(x: Tensor, rate: float) -> Tensor:
    """Return random zeros (probability `rate`) and ones of the shape and dtype of `x`.

    Four 16-bit numbers are cut from each draw of the generator: `Tensor.bernoulli_` takes one draw per element,
    one after another, which was 14 % of a training step of a small BERT.
    """
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    threshold = round(rate * 2**16) - 2**15
    return torch.ge(numbers, threshold, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
