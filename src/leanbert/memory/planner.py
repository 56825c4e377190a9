"""What a run will need, before anything is allocated: peaks by phase and category from rehearsed steps.

A step is rehearsed with few blocks and few sequences, and its course extrapolated to the whole run (see
`extrapolation`); the peak is taken after. The time this takes depends on neither model nor batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from leanbert.errors import UserError
from leanbert.memory.extrapolation import Course, NoCounterpartError, extrapolate, peaks
from leanbert.memory.rehearsal import Rehearsal, RunSettings, rehearse

SMALLEST_STACK = 3
"""Blocks of the smaller rehearsal, at least: a first, a last, and one between."""


@dataclass(frozen=True)
class Prediction:
    """Peaks of live tensors: bytes by category at the highest point of each phase; and what a step computes.

    `flops` counts the matrix products of one step on one device, `parameters` those of the model.
    """

    phases: dict[str, dict[str, int]]
    flops: int
    parameters: int

    @property
    def by_phase(self) -> dict[str, int]:
        """Peak of each phase in bytes."""
        return {phase: sum(categories.values()) for phase, categories in self.phases.items()}

    @property
    def peak_bytes(self) -> int:
        """The largest number of live bytes."""
        return max(self.by_phase.values())

    @property
    def by_category(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return max(self.phases.values(), key=lambda categories: sum(categories.values()))


def predict(settings: RunSettings, *, exact: bool = False) -> Prediction:
    """Return what a run with these settings will need on each device.

    Args:
        settings: The run.
        exact: Rehearse all blocks and sequences instead of extrapolating: slower, and the same to the byte where
            blocks are alike.

    Raises:
        UserError: Techniques that cannot combine, or match nothing.

    """
    rows, slice_rows = rows_to_rehearse(settings), _setting(settings.callbacks, "LayerMajor", "micro_batch")
    whole = settings.rows_per_step
    small = large = whole if slice_rows is not None else rows
    if not exact and slice_rows is not None:
        few = max(2, math.ceil(_rows_of_a_chunk(settings) / slice_rows)) * slice_rows
        if few + slice_rows < whole:
            small, large = few, few + slice_rows
    first = _predict_layers(settings, small, exact)
    if small == large:
        step = first.step
        flops = round(first.flops * whole / small)
    else:
        second = _predict_layers(settings, large, exact)
        times = (whole - small) / (large - small)
        step = extrapolate(first.step, second.step, times)
        flops = round(first.flops + times * (second.flops - first.flops))
    flops += first.update_flops
    phases = peaks(step)
    if small == large and whole > small:  # all micro-batches are there, not the rehearsed two
        for categories in phases.values():
            categories["other"] += (whole - small) * settings.row_bytes
    return Prediction({**phases, **peaks(first.validation)}, flops, first.parameters)


@dataclass(frozen=True)
class _Courses:
    step: list[Course]
    validation: list[Course]
    flops: int
    update_flops: int
    parameters: int

    @classmethod
    def of(cls, rehearsal: Rehearsal) -> _Courses:
        step, validation = [Course.of(rehearsal.step)], [Course.of(rehearsal.validation)]
        return cls(step, validation, rehearsal.flops, rehearsal.update_flops, rehearsal.parameters)


def _predict_layers(settings: RunSettings, rows: int, exact: bool) -> _Courses:
    """Rehearse two small stacks and extrapolate to the whole one."""
    layers = settings.task.encoder_config.num_layers
    period = period_of_blocks(settings)
    small = SMALLEST_STACK + (layers - SMALLEST_STACK) % period
    if not exact and small + period < layers:
        one, other = (_Courses.of(rehearse(settings, rows, layers=count)) for count in (small, small + period))
        times = (layers - small) / period
        try:
            return _Courses(
                extrapolate(one.step, other.step, times),
                extrapolate(one.validation, other.validation, times),
                *(
                    round(small_count + times * (large_count - small_count))
                    for small_count, large_count in (
                        (one.flops, other.flops),
                        (one.update_flops, other.update_flops),
                        (one.parameters, other.parameters),
                    )
                ),
            )
        except NoCounterpartError:
            pass  # blocks that are not alike: rehearse them all
    return _Courses.of(rehearse(settings, rows))


def period_of_blocks(settings: RunSettings) -> int:
    """Return after how many blocks the stack repeats itself."""
    config = settings.task.encoder_config.resolved()
    every = _setting(settings.callbacks, "ActivationCheckpointing", "every") or 1
    return math.lcm(every, config.global_every if config.local_window else 1)


def rows_to_rehearse(settings: RunSettings) -> int:
    """Return the sequences to rehearse: two micro-batches, of which the second finds gradients of the first."""
    schedule = _setting(settings.callbacks, "GradientAccumulation", "schedule")
    whole = settings.rows_per_step
    if schedule is None:
        return whole
    largest = max(schedule.values())
    if min(schedule.values()) < whole <= largest:
        raise UserError(
            "plan: a micro-batch schedule that begins or ends with the whole batch. Plan its largest alone."
        )
    return min(whole, 2 * largest)


def _rows_of_a_chunk(settings: RunSettings) -> int:
    """Return the sequences above which a chunked head needs no more memory for its logits; 0 if it is not chunked."""
    chunk = _setting(settings.callbacks, "ChunkedHead", "targets")
    return 0 if chunk is None else math.ceil(chunk / settings.targets_per_row)


def _setting(callbacks: Iterable[object], kind: str, name: str) -> Any:
    """Return a setting of the callback of class `kind`, or None if there is none."""
    return next((getattr(callback, name) for callback in callbacks if type(callback).__name__ == kind), None)
