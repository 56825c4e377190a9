"""Freed memory goes back to the system."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.errors import UserError
from leanbert.memory.allocator import can_be_asked, return_freed_pages
from leanbert.tasks.techniques import Techniques


class ReturnFreedPages(TechniqueCallback):
    """Hand freed memory back to the system at once, so that resident memory follows live tensors (exact).

    On CPU, with glibc. Without it LeanBERT keeps freed memory for the next step, which is faster.
    """

    def __init__(self) -> None:
        if not can_be_asked():
            raise UserError("ReturnFreedPages: needs glibc on Linux. Leave it out.")

    def register(self, techniques: Techniques) -> None:
        """Ask for freed pages to be returned."""
        techniques.returns_pages = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the C library, once for the process: not when the callback is made, as a plan makes many."""
        return_freed_pages()
