"""Which process this is of those that train together. Standard library only: signals are answered with it."""

from __future__ import annotations

import os

VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")
"""Environment variables with a process's number, of torchrun, Lightning and srun, and by hand a machine's."""


def launched_rank() -> int:
    """Return the number that this process was started with, 0 where it was started alone."""
    return next((int(os.environ[name]) for name in VARIABLES if name in os.environ), 0)
