"""Sizes and durations as people read them."""

from __future__ import annotations

import re

from leanbert.errors import UserError

MIB = 2**20
_UNITS = {"B": 1, "KiB": 2**10, "MiB": MIB, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str, setting: str) -> int:
    """Return the bytes of `512MiB`, `8GiB`, `1.5 GiB`.

    Raises UserError, naming `setting`, for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB)\s*", text)
    size = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"{setting}: {text!r} is no size. Give a number and a unit, such as 512MiB or 8GiB.")
    return size


def format_size(size_bytes: float) -> str:
    """Return bytes with the largest unit that keeps the number at 1 or more: `1.5 GiB`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes >= _UNITS[unit]:
            return f"{size_bytes / _UNITS[unit]:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """Return seconds in the two largest units that matter: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
