"""How the C library hands memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# <malloc.h> of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_pages() -> bool:
    """Let glibc keep freed memory for the next step of training; return whether it could be asked to.

    By default every large tensor is mapped anew and unmapped when it is freed, so each step touches the same pages
    for the first time again: 6 to 38 % of a step on CPU. Peak resident memory stays within a few percent. Other C
    libraries and systems are left as they are.
    """
    return _ask({M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26})


def return_freed_pages() -> bool:
    """Let glibc hand every freed block of 256 KiB and more back at once; return whether it could be asked to.

    Resident memory then follows live tensors: by default the threshold grows to 32 MiB with the first large blocks that
    are freed, and holes stay. Each step touches its pages for the first time again: on CPU it takes 1.1 to 1.6 times as
    long, by machine (docs/benchmarks.md).
    """
    return _ask({M_MMAP_THRESHOLD: 2**18, M_TRIM_THRESHOLD: 2**20, M_TOP_PAD: 0})


def can_be_asked() -> bool:
    """Return whether the C library is glibc, which takes such requests."""
    return _mallopt() is not None


def _ask(options: dict[int, int]) -> bool:
    mallopt = _mallopt()
    return mallopt is not None and all([mallopt(option, value) == 1 for option, value in options.items()])


def _mallopt() -> Any:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return None
