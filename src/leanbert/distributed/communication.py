"""What devices send each other in a step, and how long they wait for it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from leanbert.measure.torch_compat import TorchDispatchMode, group_of, in_backward_pass, tensors_in, wraps_tensors

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "gather", "scatter")
"""Collectives that are counted; the names of the last are parts of others."""

Span = tuple[int, int]
"""Begin and end in nanoseconds."""


def ring_bytes(collective: str, size_bytes: int, devices: int) -> int:
    """Return the bytes that each device sends in a ring.

    A device sends n - 1 of the n parts of a tensor to its neighbour; an all-reduce does so twice, to reduce and to
    gather (Thakur et al. 2005, section 4; the bus bandwidth of NCCL's tests is defined by the same factors). Of a
    gather or scatter, in which one device differs from the others, it is the mean over devices that take turns.

    Args:
        collective: One of `KINDS`.
        size_bytes: The whole tensor: what a device has after an all-gather, or before a reduction; of a gather or
            scatter a part.
        devices: n.

    """
    rounds = 2 if collective == "all_reduce" else 1
    return round(rounds * (devices - 1) * size_bytes / devices)


class Collectives(TorchDispatchMode):
    """Counts the bytes that this device sends in collectives, each in a ring of its group.

    Args:
        updating: Says whether the update runs.
        reduces_each: Whether gradients are reduced in each backward pass, and not in a step's last.

    Attributes:
        passes: Bytes by kind, of forward and backward passes: there are as many for each micro-batch.
        update: Bytes by kind, of the update, of gradients and of their norm: once per step.

    """

    def __init__(self, updating: Callable[[], bool] = lambda: False, *, reduces_each: bool = False) -> None:
        super().__init__()
        self._updating, self._reduces_each = updating, reduces_each
        self.passes: Counter[str] = Counter()
        self.update: Counter[str] = Counter()

    @property
    def sent_bytes(self) -> int:
        """All bytes sent."""
        return self.passes.total() + self.update.total()

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        if wraps_tensors(types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._opname.replace("_", "")
            if kind := next((kind for kind in KINDS if kind.replace("_", "") in name), None):
                of_pass = kind == "all_gather" or (self._reduces_each and in_backward_pass())
                once = self._updating() or not of_pass
                size = max(tensor.nbytes for tensor in tensors_in((args, kwargs, result)))  # a shard is smaller
                (self.update if once else self.passes)[kind] += ring_bytes(kind, size, group_of(args).size())
        return result


class CommunicationTrace:
    """Counts and times what a device does with others in a step, between `__enter__` and `__exit__`.

    On CUDA torch's profiler tells when collectives run. On a CPU it would take 75 MiB of what is to be saved; there the
    thread that computes sleeps while it waits, so that its own time says how long it did not.

    Attributes:
        sent_bytes: What this device has sent.
        wait_share: Part of the time in which collectives ran and nothing was computed, 0 to 1.

    """

    def __init__(self, device_type: str) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # nothing on standard error
        self._profile = profile(activities={ProfilerActivity.CUDA}) if device_type == "cuda" else None
        self._collectives = Collectives()
        self._started = self._ran = 0
        self.sent_bytes, self.wait_share = 0, 0.0

    def __enter__(self) -> CommunicationTrace:
        """Begin."""
        if self._profile is not None:
            self._profile.__enter__()
        self._collectives.__enter__()
        self._started, self._ran = time.perf_counter_ns(), time.thread_time_ns()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        ran, whole = time.thread_time_ns() - self._ran, time.perf_counter_ns() - self._started
        self._collectives.__exit__(None, None, None)
        self.sent_bytes = self._collectives.sent_bytes
        self.wait_share = max(0.0, 1 - ran / whole)
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            kernels = [event for event in self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
                       if event.device_type() == DeviceType.CUDA]  # fmt: skip
            waits = [_span(event) for event in kernels if "nccl" in event.name()]
            computes = [_span(event) for event in kernels if "nccl" not in event.name()]
            self.wait_share = min(1.0, waiting(waits, computes) / whole)


def _span(event: Any) -> Span:
    start: int = event.start_ns()
    return start, start + event.duration_ns()


def waiting(waits: Iterable[Span], computes: Iterable[Span]) -> int:
    """Return the nanoseconds that are in a span of `waits` and in none of `computes`."""
    busy = list(_union(computes))
    total, place = 0, 0
    for start, stop in _union(waits):
        total += stop - start
        while place < len(busy) and busy[place][1] <= start:
            place += 1
        for other in busy[place:]:
            if other[0] >= stop:
                break
            total -= min(stop, other[1]) - max(start, other[0])
    return total


def _union(spans: Iterable[Span]) -> Iterator[Span]:
    """Yield spans that do not touch, in order."""
    current: Span | None = None
    for start, stop in sorted(spans):
        if current is not None and start <= current[1]:
            current = (current[0], max(current[1], stop))
            continue
        if current is not None:
            yield current
        current = (start, stop)
    if current is not None:
        yield current
