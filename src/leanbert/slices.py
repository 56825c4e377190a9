"""Loops whose rounds are alike: on tensors without values, the first two and the last stand for all.

A rehearsal (see `rehearsal`) wants to know what a step needs, and a round needs what the one before it needed. So it
takes as long for ten slices as for a thousand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")

_times = [1]  # nested loops multiply; the backward of an accelerator runs in threads of its own: no thread-local here


def rounds(items: Sequence[T], like: Tensor) -> Iterator[T]:
    """Yield the items; if `like` is a fake tensor the first, the second, which stands for those between, and the last.

    All but the last, and the first, must need the same memory and compute; what they give may not depend on the number
    of rounds but in its values.
    """
    if len(items) <= 3 or not isinstance(like, FakeTensor) or torch.compiler.is_compiling():
        yield from items
        return
    yield items[0]
    _times.append(_times[-1] * (len(items) - 2))
    try:
        yield items[1]
    finally:
        _times.pop()
    yield items[-1]


def times() -> int:
    """Return how many rounds what runs now stands for."""
    return _times[-1]


def parts(count: int, step: int) -> list[slice]:
    """Return slices of `step` that cover `count`, the last maybe smaller."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
