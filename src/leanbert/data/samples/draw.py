"""Random choices of the grammars that make synthetic data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Random choices that are the same in every version of Python: only `random()` is promised to be."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def one_of(self, items: Sequence[T]) -> T:
        """Return one of the items, each with the same probability."""
        return items[int(self._random.random() * len(items))]

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return self._random.random() < probability


def entries(table: str) -> tuple[str, ...]:
    """Return what is between the commas."""
    return tuple(table.split(", "))
