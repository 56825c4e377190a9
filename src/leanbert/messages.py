"""Lines for the reader on standard error; standard output carries results only."""

from __future__ import annotations

import sys

from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm


@rank_zero_only
def say(line: str) -> None:
    """Write a line for the reader to standard error, above a progress bar, on the first rank only."""
    tqdm.write(line, file=sys.stderr)
