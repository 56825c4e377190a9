"""Lines for the reader on standard error; standard output carries results only."""

from __future__ import annotations

import sys

from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without the seconds it takes to import
from tqdm import tqdm


def say(line: str) -> None:
    """Write a line for the reader to standard error, above a progress bar, on the first rank only."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        tqdm.write(line, file=sys.stderr)
