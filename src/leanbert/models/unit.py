"""What is sharded as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


class Unit(nn.Module):
    """A module whose own weights, where they are sharded, are gathered before a pass through it."""

    def with_weights(self, function: Callable[..., T], *given: Any) -> T:
        """Return `function(*given)`, which uses the weights: a pass that is none of `forward`."""
        return function(*given)
