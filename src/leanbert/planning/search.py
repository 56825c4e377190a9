"""The search for the cheapest set of techniques that fits, in the order of costs of `tasks.techniques`.

The effective batch never changes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any

from leanbert.errors import UserError
from leanbert.optim.build import STATE_BITS
from leanbert.planning import overlays
from leanbert.planning.device import Target
from leanbert.planning.predict import Prediction, predict
from leanbert.planning.run_settings import RunSettings
from leanbert.tasks.techniques import TECHNIQUES, Surroundings, Technique, refuse

ENOUGH = 8
"""Micro-batches that are tried as if needs were affine."""
SMALL_EVALUATION = {"data": {"init_args": {"val_batch_size": 4}}}
"""Where training needs little, evaluation shall not need more; its result does not depend on the batch."""


@dataclass(frozen=True)
class Candidate:
    """One set of techniques: overlays beyond the given configuration, and what the run needs with them."""

    techniques: tuple[str, ...]
    micro_batch: int
    """Sequences of one forward pass on each device."""
    prediction: Prediction
    needs_bytes: int
    """Of the device: live tensors and what comes on top; on a CPU the process's resident memory."""
    added_compute: float
    """Matrix products of a step beyond those of the given configuration, as a share of these."""
    overlay: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The given configuration, all candidates in the order of their cost, and the cheapest that fits, if one does."""

    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    budget_bytes: int | None

    @property
    def given(self) -> Candidate:
        """The configuration as it is."""
        return self.candidates[0]

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate is within the budget."""
        return self.budget_bytes is None or candidate.needs_bytes <= self.budget_bytes


def ladder(settings: RunSettings, target: Target) -> list[tuple[str, ...]]:
    """Return the sets of overlays to try, the cheapest first, the given configuration (no overlay) before all.

    Of several devices whose strategy is left open each set is tried on shards too.
    """
    strategies: list[tuple[str, ...]] = [()]
    if settings.devices > 1 and settings.strategy == "auto":
        strategies.append((overlays.SHARDED,))
    ladders = (_ladder(settings, target, strategy) for strategy in strategies)
    return list(dict.fromkeys(chain.from_iterable(zip(*ladders, strict=True))))


def _ladder(settings: RunSettings, target: Target, strategy: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the set of each rung, without techniques that are refused beside the cheaper ones."""
    around = _surroundings(settings, target)
    rungs = {technique: number for technique in TECHNIQUES if (number := technique.rung(around)) is not None}
    usable: dict[Technique, int] = {}
    for technique, number in sorted(rungs.items(), key=itemgetter(1)):
        names = (*strategy, *_set_at(number, {**usable, technique: number}))
        changed = overlays.apply(settings, overlays.merge([overlays.read(name) for name in names]))
        with suppress(UserError):
            refuse(changed.techniques, _surroundings(changed, target))
            usable[technique] = number
    return [strategy, *((*strategy, *_set_at(number, usable)) for number in sorted(set(rungs.values())))]


def _surroundings(settings: RunSettings, target: Target) -> Surroundings:
    return Surroundings(
        settings.task.optimizer_config.name, settings.techniques.precision or str(settings.precision),
        target.device_type, settings.devices, shards=settings.shards, offloads=settings.shards and settings.offload,
        clips=bool(settings.clip), compiles=settings.task.compile_blocks,
    )  # fmt: skip


def _set_at(most: int, numbers: dict[Technique, int]) -> tuple[str, ...]:
    """Return the names of the techniques up to a rung, without those that another one of them replaces."""
    names: set[str] = set()
    for technique in sorted(numbers, key=lambda technique: -numbers[technique]):
        if numbers[technique] <= most and names.isdisjoint(technique.replaced_by):
            names.add(technique.name)
    return tuple(technique.name for technique in TECHNIQUES if technique.name in names)


def search(
    settings: RunSettings,
    target: Target,
    budget_bytes: int | None,
    progress: Callable[[list[tuple[str, ...]]], Iterable[tuple[str, ...]]] = iter,
    *,
    first: bool = False,
) -> Plan:
    """Predict sets of techniques and choose the cheapest that fits, with the largest micro-batch that does.

    Sets that cannot be combined with the given configuration are left out; so are those that save nothing.

    Args:
        settings: The given configuration.
        target: The device.
        budget_bytes: What the run may need; None: no choice is made.
        progress: Wraps the list of sets while it is worked through.
        first: Stop at the first that fits, instead of trying all.

    """
    trials = _Trials(settings, target)
    given = trials.given
    candidates, chosen = [given], None
    if budget_bytes is None or given.needs_bytes <= budget_bytes:
        chosen = given
    for names in progress(ladder(settings, target)[1:]):
        if first and chosen is not None:
            break
        try:
            found = _with_micro_batch(trials, names, budget_bytes, chosen)
        except UserError:
            continue
        if found.needs_bytes < candidates[-1].needs_bytes or (budget_bytes and found.needs_bytes <= budget_bytes):
            candidates.append(found)
            if chosen is None and budget_bytes is not None and found.needs_bytes <= budget_bytes:
                chosen = found
    return Plan(tuple(candidates), chosen, budget_bytes)


def _with_micro_batch(
    trials: _Trials, names: tuple[str, ...], budget_bytes: int | None, chosen: Candidate | None
) -> Candidate:
    """Return the set with the largest micro-batch that fits, or the smallest; that of the choice once it is made."""
    sizes = micro_batches(trials.given.micro_batch)
    if not sizes or not any(name in overlays.MICRO_BATCH for name in names):
        return trials.candidate(names, None)
    if chosen is not None and chosen.micro_batch in sizes:
        return trials.candidate(names, chosen.micro_batch)
    most = None
    if budget_bytes is not None and chosen is None:
        most = largest_that_fits(sizes, lambda size: trials.candidate(names, size).needs_bytes, budget_bytes)
    return trials.candidate(names, most or sizes[0])


def largest_that_fits(sizes: Sequence[int], needs_bytes: Callable[[int], int], budget_bytes: int) -> int | None:
    """Return the largest of ascending micro-batches of which `needs_bytes` is within the budget; None if none is.

    What a run needs is nearly affine in its micro-batch, so the one to try next is where a line through the two tried
    last meets the budget; where it is not, the range is halved.
    """
    tried: list[tuple[int, int]] = []

    def fits(index: int) -> bool:
        tried.append((sizes[index], needs_bytes(sizes[index])))
        return tried[-1][1] <= budget_bytes

    low, high = 0, len(sizes) - 1
    if not fits(low):
        return None
    if high == low or fits(high):
        return sizes[high]
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        (first, one), (second, other) = tried[-2:]
        if one != other and len(tried) < ENOUGH:
            meets = second + (budget_bytes - other) * (second - first) // (other - one)
            middle = min(max(bisect_right(sizes, meets) - 1, low + 1), high - 1)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return sizes[low]


def micro_batches(rows: int) -> list[int]:
    """Return `rows` halved again and again, rounded up, ascending: 1, 2, 4, ... for a power of two; without `rows`."""
    sizes = []
    while rows > 1:
        rows = -(-rows // 2)
        sizes.append(rows)
    return sizes[::-1]


class _Trials:
    """Candidates of one given configuration; what differs in nothing that tensors see has one dry run."""

    def __init__(self, settings: RunSettings, target: Target) -> None:
        self.settings, self.target = settings, target
        prediction = predict(settings)
        self._predictions: dict[tuple[tuple[str, ...], int | None], Prediction] = {((), None): prediction}
        needs = target.needs(prediction.peak_bytes, settings.techniques)
        self.given = Candidate((), settings.micro_batch, prediction, needs, 0.0, {})

    def candidate(self, names: tuple[str, ...], micro_batch: int | None) -> Candidate:
        """Return a set of techniques, with its micro-batch if it has one."""
        seen = tuple(name for name in names if name != "return_pages")
        if (seen, micro_batch) not in self._predictions:
            self._predictions[seen, micro_batch] = predict(self._changed(seen, micro_batch))
        prediction = self._predictions[seen, micro_batch]
        needs = self.target.needs(prediction.peak_bytes, self._changed(names, micro_batch).techniques)
        added = prediction.flops / self.given.prediction.flops - 1
        overlay = self._overlay(names, micro_batch)
        return Candidate(names, micro_batch or self.given.micro_batch, prediction, needs, added, overlay)

    def _changed(self, names: tuple[str, ...], micro_batch: int | None) -> RunSettings:
        return overlays.apply(self.settings, self._overlay(names, micro_batch))

    def _overlay(self, names: tuple[str, ...], micro_batch: int | None) -> dict[str, Any]:
        overlay = overlays.merge([overlays.read(name, micro_batch) for name in names])
        optimizer = overlay.get("model", {}).get("init_args", {}).get("optimizer")
        if optimizer and optimizer["name"] in STATE_BITS and self.settings.task.optimizer_config.name == "muon":
            optimizer["lr"] = 1e-3  # muon's rate for embeddings is too high for the matrices
        if micro_batch is not None and self.settings.validation_rows > 4:
            overlay = overlays.merge([overlay, SMALL_EVALUATION])
        return overlay
