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

from leanbert.measure.timeline import CATEGORIES, PHASES, Timeline

SEEN_AHEAD = 1000
"""Events by which the end of an inserted stretch is found: more than a pass through a block has, lest one be taken for
the next."""


class NoCounterpartError(Exception):
    """The larger trace is not the smaller one with stretches inserted."""


@dataclass(frozen=True)
class Course:
    """Live bytes by category in the order of `CATEGORIES` after each event, float64 [E, C], and what happened, [E]."""

    labels: tuple[tuple[str, str, bool], ...]
    live: npt.NDArray[np.float64]

    @classmethod
    def of(cls, timeline: Timeline) -> Course:
        """Return the course of a trace; a label is phase, category with the maker's name, and whether bytes grew.

        What an update makes for a moment depends on its parameter only: there the bytes are part of the name, or the
        update of what comes after the blocks would pass for that of one block more.
        """
        labels = []
        for event in timeline.events:
            storage = event.storage
            name = "" if storage is None else f"{storage.category} {re.sub(r'[0-9]+', '', storage.module)}"
            if event.phase == "optimizer" and storage is not None and storage.category == "optimizer":
                name += f" {abs(event.delta_bytes)}"
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


def extrapolate(small: Sequence[Course], *directions: tuple[Sequence[Course], float]) -> list[Course]:
    """Return courses whose highest points are those of a larger run.

    In a repeated stretch, what comes first depends on the number of repetitions by what came before, what comes last
    by all repetitions: two courses for each of `small`, one aligned from the front and one from the back.

    Args:
        small: The courses of a run.
        directions: Those of larger runs, each with how many times as far from `small` the wanted one is in their
            direction. Directions are independent: what is due to both at once is in neither.

    Raises NoCounterpartError if events cannot be aligned.
    """
    result = []
    for index, one in enumerate(small):
        front, back = one.live.copy(), one.live.copy()
        same = True
        for larger, times in directions:
            other = larger[index]
            if one.labels == other.labels:
                step = times * (other.live - one.live)
                front += step
                back += step
                continue
            same = False
            first = np.array(_counterparts(one.labels, other.labels))
            last = len(other.labels) - 1 - np.array(_counterparts(one.labels[::-1], other.labels[::-1]))[::-1]
            front += times * (other.live[first] - one.live)
            back += times * (other.live[last] - one.live)
        result += [Course(one.labels, live) for live in ([front] if same else [front, back])]
    return result


def _counterparts(small: Sequence[object], large: Sequence[object]) -> list[int]:
    """Return for each event of `small` the place of its counterpart in `large`, the first possible one."""
    letters: dict[object, str] = {}
    for label in (*small, *large):
        letters.setdefault(label, chr(len(letters)))
    first, second = ("".join(letters[label] for label in labels) for labels in (small, large))  # strings compare fast
    places: list[int] = []
    at = 0
    for index, letter in enumerate(first):
        if at >= len(second) or second[at] != letter:  # a stretch was inserted: what follows it agrees for longest
            starts = [start for start in range(at, len(second)) if second[start] == letter]
            if not starts:
                raise NoCounterpartError(f"event {index}: {small[index]}")
            rest = first[index : index + SEEN_AHEAD]
            at = max(starts, key=lambda start: _agreement(rest, second[start : start + SEEN_AHEAD]))
        places.append(at)
        at += 1
    return places


def _agreement(first: str, second: str) -> int:
    """Return for how many letters both begin alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[:middle] == second[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
