"""Lines for the reader on standard error; standard output carries results only."""

from __future__ import annotations

import sys
from functools import cache

from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without the seconds it takes to import
from tqdm import tqdm

from leanbert.ranks import launched_rank


def rank() -> int:
    """Return this process's number among those that train together."""
    return getattr(rank_zero_only, "rank", launched_rank())  # Lightning sets it, which reading files does not pay for


def leads() -> bool:
    """Return whether this is the first rank, which alone speaks, and makes and locks run folders."""
    return rank() == 0


def say(line: str) -> None:
    """Write a line for the reader to standard error, above a progress bar, on the first rank only."""
    if leads():
        tqdm.write(line, file=sys.stderr)


@cache
def say_once(line: str) -> None:
    """Say a line the first time only: files are read several times, for tokenizer, training and validation."""
    say(line)
