"""Which steps to sample, so that all samples together take a fixed part of the time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from statistics import median

TIME_FRACTION = 0.015
"""Part of the time that samples take."""

FIRST_STEPS = 10
"""Steps of a process in which memory is first touched and kernels are chosen: their time says nothing."""


class SampleClock:
    """Chooses the steps to sample.

    The second step of a process is one, for the first creates the optimizer's state. A later sample costs what its
    step takes longer than the steps before it (their median); the next is due when 1 / TIME_FRACTION times that has
    gone by since.

    Args:
        every_n_steps: Sample the steps of the run that this divides instead.
        clock: Seconds now.

    """

    def __init__(self, every_n_steps: int | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.every_n_steps, self.clock = every_n_steps, clock
        self._plain_seconds: deque[float] = deque(maxlen=9)
        self._steps = 0
        self._started = self._due = 0.0

    def begin(self, step: int) -> bool:
        """Return whether to sample `step` of the run, which begins now."""
        self._steps += 1
        self._started = self.clock()
        if self._steps == 2:
            return True
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        return self._steps > FIRST_STEPS and self._started >= self._due

    def end(self, sampled: bool) -> None:
        """Take in how long the step took that ends now."""
        now = self.clock()
        seconds = now - self._started
        if not sampled:
            self._plain_seconds.append(seconds)
        elif self._steps > FIRST_STEPS and self.every_n_steps is None:
            self._due = now + max(0.0, seconds - median(self._plain_seconds)) / TIME_FRACTION
