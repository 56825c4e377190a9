"""Memory of this process and of its devices, in bytes."""

from __future__ import annotations

import sys

import psutil
import torch


def rss_bytes() -> int:
    """Return the resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Return the largest resident memory that this process has had since its start."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB


def device_bytes(device: torch.device) -> dict[str, int]:
    """Return `allocated`, `reserved` and `peak` of an accelerator; empty for the CPU.

    `peak` is that of live tensors since the start or since `torch.cuda.reset_peak_memory_stats`; MPS has none.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    if device.type == "mps":
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
        }
    return {}
