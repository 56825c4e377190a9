"""What a run will need, before anything is allocated: peaks by phase and category from rehearsed steps.

A step is rehearsed with few blocks and few sequences, and its course extrapolated to the whole run (see
`extrapolation`); the peak is taken after. The time this takes depends on neither model nor batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from leanbert.errors import UserError
from leanbert.memory.extrapolation import Course, NoCounterpart, extrapolate, peaks
from leanbert.memory.rehearsal import Rehearsal, RunSettings, rehearse

SMALLEST_STACK = 3
"""Blocks of the smaller rehearsal, at least: a first, a last, and one between."""


@dataclass(frozen=True)
class Prediction:
    """Peaks of live tensors: bytes by category at the highest point of each phase; and what a step computes.

    `flops` counts the matrix products of one step on one device, `parameters` those of the model. `gradient_bytes` are
    those of all its gradients; `collectives` the bytes of tensors that devices gather and reduce in a step, by kind.
    """

    phases: dict[str, dict[str, int]]
    flops: int
    parameters: int
    gradient_bytes: int = 0
    collectives: dict[str, int] = field(default_factory=dict)

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
    rows, slice_rows = _rows(settings), _setting(settings.callbacks, "LayerMajor", "micro_batch")
    whole = settings.rows_per_step
    if exact or slice_rows is None or 3 * slice_rows >= whole:
        small = large = whole if slice_rows is not None else rows
    else:
        small, large = 2 * slice_rows, 3 * slice_rows
    first = _predict_layers(settings, small, exact)
    if small == large:
        step = first.step
        flops = round(first.flops * whole / rows) if slice_rows is None else first.flops
    else:
        second = _predict_layers(settings, large, exact)
        times = (whole - small) / (large - small)
        step = extrapolate(first.step, second.step, times)
        flops = round(first.flops + times * (second.flops - first.flops))
    phases = peaks(step)
    if small == large and whole > small:  # all micro-batches are there, not the rehearsed two
        for categories in phases.values():
            categories["other"] += (whole - small) * settings.row_bytes
    micro_batches = _micro_batches(settings, whole) / _micro_batches(settings, small)
    collectives = Counter({kind: round(size * micro_batches) for kind, size in first.passes_bytes.items()})
    collectives.update(first.update_bytes)
    return Prediction(
        {**phases, **peaks(first.validation)}, flops, first.parameters, first.gradient_bytes, dict(collectives)
    )


@dataclass(frozen=True)
class _Courses:
    step: list[Course]
    validation: list[Course]
    flops: int
    parameters: int
    gradient_bytes: int
    passes_bytes: dict[str, int]
    update_bytes: dict[str, int]

    @classmethod
    def of(cls, rehearsal: Rehearsal) -> _Courses:
        step, validation = [Course.of(rehearsal.step)], [Course.of(rehearsal.validation)]
        totals = (getattr(rehearsal, each.name) for each in fields(cls)[2:])
        return cls(step, validation, *totals)


def _predict_layers(settings: RunSettings, rows: int, exact: bool) -> _Courses:
    """Rehearse two small stacks and extrapolate to the whole one."""
    layers = settings.task.encoder_config.num_layers
    period = _period(settings)
    least = SMALLEST_STACK + (settings.mesh is not None)  # sharded blocks are gathered one ahead
    small = least + (layers - least) % period
    if not exact and small + period < layers:
        one, other = (_Courses.of(rehearse(settings, rows, layers=count)) for count in (small, small + period))
        times = (layers - small) / period
        try:
            return _Courses(
                extrapolate(one.step, other.step, times),
                extrapolate(one.validation, other.validation, times),
                *(_affine(getattr(one, each.name), getattr(other, each.name), times) for each in fields(_Courses)[2:]),
            )
        except NoCounterpart:
            pass  # blocks that are not alike: rehearse them all
    return _Courses.of(rehearse(settings, rows))


def _affine(one: Any, other: Any, times: float) -> Any:
    """Return the integer `times` as far from `one` as `other` is, in dictionaries value by value."""
    if isinstance(one, dict):
        return {key: _affine(value, other[key], times) for key, value in one.items()}
    return round(one + times * (other - one))


def _period(settings: RunSettings) -> int:
    """Return after how many blocks the stack repeats itself."""
    config = settings.task.encoder_config.resolved()
    every = _setting(settings.callbacks, "ActivationCheckpointing", "every") or 1
    return math.lcm(every, config.global_every if config.local_window else 1)


def _rows(settings: RunSettings) -> int:
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


def _micro_batches(settings: RunSettings, rows: int) -> int:
    """Return how many micro-batches `rows` sequences make."""
    schedule = _setting(settings.callbacks, "GradientAccumulation", "schedule")
    return 1 if schedule is None else -(-rows // max(schedule.values()))


def _setting(callbacks: Iterable[object], kind: str, name: str) -> Any:
    """Return a setting of the callback of class `kind`, or None if there is none."""
    return next((getattr(callback, name) for callback in callbacks if type(callback).__name__ == kind), None)
