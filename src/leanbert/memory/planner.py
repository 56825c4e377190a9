"""What a run will need, before anything is allocated: peaks by phase and category from rehearsed steps.

A step is rehearsed with few blocks and few sequences, and its course extrapolated to the whole run (see
`extrapolation`); the peak is taken after. The time this takes depends on neither model nor batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from leanbert.errors import UserError
from leanbert.memory.extrapolation import Course, NoCounterpartError, extrapolate, peaks
from leanbert.memory.rehearsal import Rehearsal, RunSettings, Totals, rehearse

SMALLEST_STACK = 2
"""Blocks of the smaller rehearsal, at least: a first and a last."""


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
    whole, slice_rows = settings.rows_per_step, settings.slice_rows
    if slice_rows is not None and not exact:
        chunk = _rows_of_a_chunk(settings)
        few = max(2, math.ceil(chunk / slice_rows) if whole > chunk else 0) * slice_rows
        if few + slice_rows < whole:
            small, large = (_predict_layers(settings, rows) for rows in (few, few + slice_rows))
            with suppress(NoCounterpartError):  # else the steps are not alike: rehearse the whole one
                return _assemble(settings, small, few, (large, (whole - few) / slice_rows))
    rows = whole if slice_rows is not None else rows_to_rehearse(settings)
    return _assemble(settings, _predict_layers(settings, rows, exact), rows)


class MicroBatches:
    """Predictions for every micro-batch of a run, from rehearsals at two of them.

    Args:
        settings_with: Returns the settings of the run with a micro-batch of GradientAccumulation or LayerMajor.

    """

    def __init__(self, settings_with: Callable[[int], RunSettings]) -> None:
        self.settings_with = settings_with
        first = settings_with(1)
        self._chunk, in_slices = _rows_of_a_chunk(first), first.slice_rows is not None
        self._size = 2  # a single sequence spares some copies
        if in_slices and first.rows_per_step > self._chunk > 0:
            self._size = max(2, _rows_of_full_chunks(first))
        self._small, self._large = (self._rehearse(size, 2 * size) for size in (self._size, 2 * self._size))
        self._longer = self._rehearse(self._size, 3 * self._size) if in_slices else None

    def _rehearse(self, micro_batch: int, rows: int) -> _Courses:
        return _predict_layers(self.settings_with(micro_batch), rows)

    def predict(self, micro_batch: int) -> Prediction:
        """Return what the run needs with a micro-batch that cuts its rows."""
        settings, size = self.settings_with(micro_batch), self._size
        if self._longer is None and 0 < self._chunk < micro_batch:
            return predict(settings)
        directions = [(self._large, micro_batch / size - 1)]
        rows = 2 * micro_batch
        if self._longer is not None:
            directions.append((self._longer, (settings.rows_per_step - rows) / size))
            rows = settings.rows_per_step
        try:
            return _assemble(settings, self._small, rows, *directions)
        except NoCounterpartError:  # a head that works in other pieces with another micro-batch
            return predict(settings)


def _assemble(settings: RunSettings, small: _Courses, rows: int, *directions: tuple[_Courses, float]) -> Prediction:
    """Return the prediction of a run of which a step of `rows` sequences was found, `small` and its directions."""
    step = extrapolate(small.step, *((larger.step, times) for larger, times in directions))
    totals = small.totals
    flops = totals.flops + sum(times * (larger.totals.flops - totals.flops) for larger, times in directions)
    phases, whole = peaks(step), settings.rows_per_step
    if not directions or settings.slice_rows is None:  # all micro-batches are there, not the rehearsed two
        flops *= whole / rows
        for categories in phases.values():
            categories["other"] += (whole - rows) * settings.row_bytes
    phases.update(peaks(small.validation))
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


def _predict_layers(settings: RunSettings, rows: int, exact: bool = False) -> _Courses:
    """Rehearse two small stacks and extrapolate to the whole one."""
    layers = settings.task.encoder_config.num_layers
    period = period_of_blocks(settings)
    least = SMALLEST_STACK + 2 * (settings.mesh is not None)  # sharded blocks are gathered one ahead
    small = least + (layers - least) % period
    if not exact and small + period < layers:
        one, other = (_Courses.of(rehearse(settings, rows, layers=count)) for count in (small, small + period))
        times = (layers - small) / period
        try:
            return _Courses(
                extrapolate(one.step, (other.step, times)),
                extrapolate(one.validation, (other.validation, times)),
                Totals(**_affine(vars(one.totals), vars(other.totals), times)),
            )
        except NoCounterpartError:
            pass  # blocks that are not alike: rehearse them all
    return _Courses.of(rehearse(settings, rows))


def _affine(one: Any, other: Any, times: float) -> Any:
    """Return the integer `times` as far from `one` as `other` is, in dictionaries value by value."""
    if isinstance(one, dict):
        return {key: _affine(value, other[key], times) for key, value in one.items()}
    return round(one + times * (other - one))


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


def _rows_of_full_chunks(settings: RunSettings) -> int:
    """Return the fewest sequences whose targets fill chunks of the head (nearly): with each more, whole chunks more."""
    chunk, targets = settings.callback("ChunkedHead").targets, settings.targets_per_row
    rows = math.ceil(chunk / targets)
    while rows * targets % chunk > 0.04 * rows * targets:
        rows += 1
    return rows


def _micro_batches(settings: RunSettings, rows: int) -> int:
    """Return how many micro-batches `rows` sequences make."""
    size = settings.accumulated_rows
    return 1 if size is None else -(-rows // size)
