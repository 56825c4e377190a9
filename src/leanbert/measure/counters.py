"""Memory of this process and of its devices, in bytes."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import psutil
import torch

from leanbert.units import MIB

_highest_peaks: dict[torch.device, int] = {}


def rss_bytes() -> int:
    """Return the resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Return the largest resident memory that this process has had since its start."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss would begin with that of the process which started this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii", errors="replace"))
        if found is not None:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)  # Linux counts in KiB


def device_name(device: torch.device) -> str:
    """Return the name of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")  # on Linux; platform has the kind only there
    found = re.search(r"model name\s*: (.+)", known.read_text(errors="replace")) if known.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def device_bytes(device: torch.device) -> dict[str, int]:
    """Return `allocated`, `reserved` and `peak` of an accelerator; empty for the CPU.

    `peak` is that of live tensors since the start, whatever `restart_peak` did; MPS has none.
    """
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": max(torch.cuda.max_memory_allocated(device), _highest_peaks.get(device, 0)),
        }
    if device.type == "mps":
        return {
            "allocated": torch.mps.current_allocated_memory(),
            "reserved": torch.mps.driver_allocated_memory(),
        }
    return {}


def restart_peak(device: torch.device) -> int:
    """Return the peak of live tensors on a CUDA device since the last call, in bytes, and begin a new one."""
    peak = torch.cuda.max_memory_allocated(device)
    _highest_peaks[device] = max(peak, _highest_peaks.get(device, 0))
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def cuda_allocator(device: torch.device) -> dict[str, float]:
    """Return by TensorBoard tag what PyTorch's CUDA allocator and the driver say of a device.

    `memory/active_mib`: blocks in use, also those that a stream still waits for; `memory/fragmented_mib`: free pieces
    of blocks in use, which fit only smaller tensors; `memory/device_used_mib`: by all processes on the device;
    `memory/allocation_retries`: times that the cache had to be emptied, each of which stops the device.
    """
    statistics = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "memory/active_mib": statistics["active_bytes.all.current"] / MIB,
        "memory/fragmented_mib": statistics["inactive_split_bytes.all.current"] / MIB,
        "memory/device_used_mib": (total - free) / MIB,
        "memory/allocation_retries": statistics["num_alloc_retries"],
    }
