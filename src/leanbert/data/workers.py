"""Processes for work that holds Python's lock: as many as the container allows, light, and never orphaned."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

from leanbert import signals

MOST_WORKERS = 8
"""Each takes some 40 MiB of memory."""


def available_cpus() -> int:
    """Return how many processors this process may use: affinity and the container's quota, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, math.ceil(min(count, _cgroup_quota(Path("/sys/fs/cgroup")))))


@contextmanager
def process_pool() -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of fresh processes that end when this one does, however it ends."""
    context = multiprocessing.get_context("spawn")
    workers = min(available_cpus(), MOST_WORKERS)
    with _without_main_module(), ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        with signals.deaf_children():
            pool.submit(int)  # starts them
        yield pool


def _cgroup_quota(root: Path) -> float:
    """Return the processors that the control group grants, version 2 or 1; infinite without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        quota_us = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((root / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return math.inf
    return quota_us / period_us if quota_us > 0 else math.inf


@contextmanager
def _without_main_module() -> Iterator[None]:
    # A spawned process imports its parent's main module, which imports torch: 380 MiB that no worker needs.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent() -> None:
    # Workers hold both ends of their queue and never see that a killed parent is gone.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
