"""Live bytes of a larger run from the traces of two smaller ones.

A stack of blocks, and a batch cut into slices, repeat themselves: a run with one more of them has the same events with
one stretch more in each pass. So each event of the smaller trace has a counterpart in the larger one, and its live
bytes are an affine function of the number of repetitions. The peak, a maximum of affine functions, is not: it is taken
after.

Letters: E events, C categories.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanbert.memory.timeline import CATEGORIES, PHASES, Timeline

SEEN_AHEAD = 512
"""Events by which the end of an inserted stretch is found: more than a pass through a block has, lest one be taken for
the next."""


class NoCounterpart(Exception):
    """The larger trace is not the smaller one with stretches inserted."""


@dataclass(frozen=True)
class Course:
    """Live bytes by category in the order of `CATEGORIES` after each event, float64 [E, C], and what happened, [E]."""

    labels: tuple[tuple[str, str, bool], ...]
    live: npt.NDArray[np.float64]

    @classmethod
    def of(cls, timeline: Timeline) -> Course:
        """Return the course of a trace; a label is phase, category with the maker's name, and whether bytes grew."""
        labels = []
        for event in timeline.events:
            storage = event.storage
            name = "" if storage is None else f"{storage.category} {re.sub(r'[0-9]+', '', storage.module)}"
            labels.append((event.phase, name, event.delta_bytes > 0))
        return cls(tuple(labels), timeline.live.astype(np.float64))


def peaks(courses: Sequence[Course]) -> dict[str, dict[str, int]]:
    """Return bytes by category at the highest point of each phase, over all courses."""
    found: dict[str, dict[str, int]] = {}
    for course in courses:
        phases, totals = np.array([phase for phase, _, _ in course.labels]), course.live.sum(axis=1)
        for name in PHASES:
            if (phases == name).any():
                row = course.live[int(np.where(phases == name, totals, -1.0).argmax())]
                if row.sum() > sum(found.get(name, {}).values()):
                    found[name] = dict(zip(CATEGORIES, np.rint(row).astype(int).tolist(), strict=True))
    return found


def extrapolate(small: Sequence[Course], large: Sequence[Course], times: float) -> list[Course]:
    """Return courses whose highest points are those of a run `times` as far from `small` as `large` is.

    In a repeated stretch, what comes first depends on the number of repetitions by what came before, what comes last
    by all repetitions: two courses for each of `small`, one aligned from the front and one from the back.

    Raises NoCounterpart if events cannot be aligned.
    """
    result = []
    for one, other in zip(small, large, strict=True):
        front = np.array(_counterparts(one.labels, other.labels))
        back = len(other.labels) - 1 - np.array(_counterparts(one.labels[::-1], other.labels[::-1]))[::-1]
        for counterparts in (front, back):
            result.append(Course(one.labels, one.live + times * (other.live[counterparts] - one.live)))
    return result


def _counterparts(small: Sequence[object], large: Sequence[object]) -> list[int]:
    """Return for each event of `small` the place of its counterpart in `large`, the first possible one."""
    numbers: dict[object, int] = {}
    first, second = ([numbers.setdefault(label, len(numbers)) for label in labels] for labels in (small, large))
    places: list[int] = []
    at = 0
    for index, label in enumerate(first):
        if at >= len(second) or second[at] != label:  # a stretch was inserted: what follows it agrees for longest
            lengths = [_agreement(first, index, second, start) for start in range(at, len(second))]
            if max(lengths, default=0) == 0:
                raise NoCounterpart(f"event {index}: {small[index]}")
            at += int(np.argmax(lengths))
        places.append(at)
        at += 1
    return places


def _agreement(first: list[int], index: int, second: list[int], start: int) -> int:
    """Return for how many events, up to `SEEN_AHEAD`, `first` from `index` on equals `second` from `start` on."""
    length, most = 0, min(SEEN_AHEAD, len(first) - index, len(second) - start)
    while length < most and first[index + length] == second[start + length]:
        length += 1
    return length
