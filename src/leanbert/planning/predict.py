"""What a run will need, before anything is allocated: peaks by phase and category from rehearsed steps.

A step is rehearsed with few blocks and few micro-batches, its loops with few rounds (see `rounds`), and its course
extrapolated to the whole run (see `extrapolation`); the peak is taken after. The time this takes depends on neither
model nor batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from leanbert.errors import UserError
from leanbert.planning.dry_run import Rehearsal, RunSettings, Totals, rehearse
from leanbert.planning.extrapolation import Course, NoCounterpartError, extrapolate, peaks

SMALLEST_STACK = 2
"""Blocks of the smaller rehearsal, at least: a first and a last."""

REHEARSED = 2
"""The smaller of two micro-batches that stand for all others; a single sequence would spare some copies."""

SLICES_ALIKE = 3
"""Slices of layer-major execution, at least, that look like any larger number of them (see `rounds`)."""


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
    rows = rows_to_rehearse(settings)
    return _assemble(settings, _rehearse_stack(settings, rows, exact), rows)


class MicroBatches:
    """Predictions for every micro-batch of a run, from rehearsals at two of them.

    Args:
        settings_with: Returns the settings of the run with a micro-batch of GradientAccumulation or LayerMajor.

    """

    def __init__(self, settings_with: Callable[[int], RunSettings]) -> None:
        self.settings_with = settings_with
        first = settings_with(1)
        self._chunk, self._in_slices = _rows_of_a_chunk(first), first.slice_rows is not None
        self._few = self._in_slices and first.rows_per_step < SLICES_ALIKE * 2 * REHEARSED
        if self._few:
            return
        small, large = settings_with(REHEARSED), settings_with(2 * REHEARSED)
        rows = (first.rows_per_step,) * 2 if self._in_slices else (2 * REHEARSED, 4 * REHEARSED)
        self._blocks: list[tuple[_Courses, float]] = []
        if self._in_slices and _is_tall(small):  # what a slice needs does not depend on the number of blocks
            self._small, *self._blocks = _small_stacks(small, rows[0])
            self._large = _Courses.of(rehearse(large, rows[1], layers=_smallest_stack(large)))
        else:
            self._small, self._large = _rehearse_stack(small, rows[0]), _rehearse_stack(large, rows[1])

    def predict(self, micro_batch: int) -> Prediction:
        """Return what the run needs with a micro-batch that cuts its rows."""
        settings = self.settings_with(micro_batch)
        if self._few or (not self._in_slices and 0 < self._chunk < micro_batch):
            return predict(settings)
        rows = settings.rows_per_step if self._in_slices else 2 * micro_batch
        try:
            courses = self._small.towards(*self._blocks, (self._large, micro_batch / REHEARSED - 1))
        except NoCounterpartError:  # a head that works in other pieces with another micro-batch
            return predict(settings)
        return _assemble(settings, courses, rows)


def _assemble(settings: RunSettings, courses: _Courses, rows: int) -> Prediction:
    """Return the prediction of a run from the courses of a step of `rows` sequences."""
    totals, phases, whole = courses.totals, peaks(courses.step), settings.rows_per_step
    flops = totals.flops * whole / rows  # all micro-batches are there, not the rehearsed two
    for categories in phases.values():
        categories["other"] += (whole - rows) * settings.row_bytes
    phases.update(peaks(courses.validation))
    reduced = totals.gradient_bytes if settings.devices > 1 and settings.mesh is None else 0
    for categories in phases.values():  # DDP's buckets: a copy of all gradients, from the first step to the end
        categories["gradients"] += reduced
    micro_batches = _micro_batches(settings, whole) / _micro_batches(settings, rows)
    collectives = Counter({kind: round(size * micro_batches) for kind, size in totals.passes_bytes.items()})
    collectives.update(totals.update_bytes)
    collectives.update({"all_reduce": reduced} if reduced else {})
    return Prediction(
        phases, round(flops) + totals.update_flops, totals.parameters, totals.gradient_bytes, dict(collectives)
    )


@dataclass(frozen=True)
class _Courses:
    step: list[Course]
    validation: list[Course]
    totals: Totals

    @classmethod
    def of(cls, rehearsal: Rehearsal) -> _Courses:
        return cls([Course.of(rehearsal.step)], [Course.of(rehearsal.validation)], rehearsal.totals)

    def towards(self, *directions: tuple[_Courses, float]) -> _Courses:
        """Return the courses of a larger run; `directions` as in `extrapolate`."""
        totals = vars(self.totals)
        return _Courses(
            extrapolate(self.step, *((larger.step, times) for larger, times in directions)),
            extrapolate(self.validation, *((larger.validation, times) for larger, times in directions)),
            Totals(**_affine(totals, [(vars(larger.totals), times) for larger, times in directions])),
        )


def _affine(start: Any, directions: list[tuple[Any, float]]) -> Any:
    """Return the integer so many times as far from `start` as the other ones are, in dictionaries value by value."""
    if isinstance(start, dict):
        return {key: _affine(value, [(other[key], t) for other, t in directions]) for key, value in start.items()}
    return round(start + sum(times * (other - start) for other, times in directions))


def _rehearse_stack(settings: RunSettings, rows: int, exact: bool = False) -> _Courses:
    """Rehearse two small stacks and extrapolate to the whole one."""
    if exact or not _is_tall(settings):
        return _Courses.of(rehearse(settings, rows))
    small, larger = _small_stacks(settings, rows)
    try:
        return small.towards(larger)
    except NoCounterpartError:  # blocks that are not alike: rehearse them all
        return _Courses.of(rehearse(settings, rows))


def _small_stacks(settings: RunSettings, rows: int) -> tuple[_Courses, tuple[_Courses, float]]:
    """Return the courses of the smallest stack, and the direction to the whole one."""
    small, period = _smallest_stack(settings), period_of_blocks(settings)
    one, other = (_Courses.of(rehearse(settings, rows, layers=count)) for count in (small, small + period))
    return one, (other, (settings.task.encoder_config.num_layers - small) / period)


def _is_tall(settings: RunSettings) -> bool:
    """Whether the stack is higher than those that it is extrapolated from."""
    return _smallest_stack(settings) + period_of_blocks(settings) < settings.task.encoder_config.num_layers


def _smallest_stack(settings: RunSettings) -> int:
    """Return the fewest blocks to rehearse, whole periods less than all."""
    layers, least = settings.task.encoder_config.num_layers, SMALLEST_STACK
    if settings.mesh is not None:  # sharded blocks are gathered one ahead
        least += 2
    return min(layers, least + (layers - least) % period_of_blocks(settings))


def period_of_blocks(settings: RunSettings) -> int:
    """Return after how many blocks the stack repeats itself."""
    config = settings.task.encoder_config.resolved()
    checkpointing = settings.callback("ActivationCheckpointing")
    every = 1 if checkpointing is None else checkpointing.every
    return math.lcm(every or 1, config.global_every if config.local_window else 1)


def rows_to_rehearse(settings: RunSettings) -> int:
    """Return the sequences to rehearse: two micro-batches, of which the second finds gradients of the first."""
    whole, largest = settings.rows_per_step, settings.accumulated_rows
    if largest is None or settings.slice_rows is not None:  # which cannot combine: the rehearsal says so
        return whole
    if min(settings.callback("GradientAccumulation").schedule.values()) < whole <= largest:
        raise UserError(
            "plan: a micro-batch schedule that begins or ends with the whole batch. Plan its largest alone."
        )
    return min(whole, 2 * largest)


def _rows_of_a_chunk(settings: RunSettings) -> int:
    """Return the sequences above which a chunked head needs no more memory for its logits; 0 if it is not chunked."""
    head = settings.callback("ChunkedHead")
    return 0 if head is None else math.ceil(head.targets / settings.targets_per_row)


def _micro_batches(settings: RunSettings, rows: int) -> int:
    """Return how many micro-batches `rows` sequences make."""
    size = settings.accumulated_rows
    return 1 if size is None else -(-rows // size)
