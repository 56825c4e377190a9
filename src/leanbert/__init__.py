"""LeanBERT: train BERT encoders inside a device-memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanbert.errors import UserError

if TYPE_CHECKING:
    from leanbert.api import load

__all__ = ["UserError", "load"]


def __getattr__(name: str) -> object:
    # Lazy: the workers that tokenise import this package and must not pay for torch (about 380 MiB each).
    if name == "load":
        from leanbert.api import load

        return load
    raise AttributeError(f"module 'leanbert' has no attribute {name!r}")
