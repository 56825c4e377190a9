"""What a step of an optimizer does first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def with_gradients(closure: Callable[[], Any] | None) -> Any:
    """Return what a closure returns, run with gradients where the step has none; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
