"""Which sets of techniques a plan tries, in the order of what they cost, and the search for the cheapest that fits.

The order: what is free, micro-batches, 16-bit products, selective then full checkpointing, the optimizer in the
backward pass, low-bit optimizer state, 16-bit weights, offload, and last what changes the model. The effective batch
never changes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from leanbert.errors import UserError
from leanbert.memory.allocator import can_be_asked
from leanbert.memory.precision import has_16_bit_products
from leanbert.optim.build import STATE_BITS
from leanbert.planning import overlays
from leanbert.planning.device import Target
from leanbert.planning.predict import Prediction, predict
from leanbert.planning.run_settings import RunSettings

STATEFUL = ("adam", "adamw", "muon")
"""Optimizers whose state low-bit AdamW can take the place of."""

COSTS = {
    "chunked_head": "",
    "return_pages": "page faults: a step takes 1.1 to 1.6 times as long, by machine",
    "accumulation": "small products use the device less well",
    "bf16_mixed": "16-bit rounding of products",
    "selective_checkpointing": "",
    "checkpointing": "",
    "layer_major": "",
    "optimizer_in_backward": "no clipping of gradients, one device",
    "adamw_8bit": "8-bit moments",
    "adamw_4bit": "4-bit moments",
    "bf16_true": "weights in bfloat16, rounded at random",
    "offload": "the disk's speed",
    "offload_host": "the bus to the host",
    "structured_pruning": "half of the heads and neurons leave the model",
}
"""What each overlay costs besides compute, which is counted."""

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

    For a CPU without 16-bit matrix products (a CPU target is this machine) 16 bits come last: they take longer than
    all else.
    """
    own = settings.techniques.precision
    optimizer = settings.task.optimizer_config.name
    products = target.device_type != "cpu" or has_16_bit_products("cpu")
    whole = own is None and str(settings.precision) in ("32-true", "32")
    half = ("bf16_mixed",) if products and whole else ()
    whole_weights = own is None and "true" in str(settings.precision).replace("32-true", "")
    low_bits = ("adamw_8bit", "adamw_4bit") if optimizer in STATEFUL else ()
    free = ("return_pages",) if target.device_type == "cpu" and can_be_asked() else ()
    offload = "offload" if target.device_type == "cpu" else "offload_host"
    in_slices = (*free, "chunked_head", "layer_major", "optimizer_in_backward")
    last = low_bits[-1:]
    sets = [(), ("chunked_head",), (*free, "chunked_head"), (*free, "accumulation"), (*free, "accumulation", *half)]
    sets += [(*free, "accumulation", *half, kind) for kind in ("selective_checkpointing", "checkpointing")]
    sets += [(*in_slices, *half), *((*in_slices, *half, bits) for bits in low_bits)]
    bf16_weights = () if whole_weights else ("bf16_true",)
    if products:
        last = (*last, *bf16_weights)
        sets.append((*in_slices, *last))
    sets.append((*in_slices, *last, offload))
    if not products:  # slower than the disk
        last = (*last, *bf16_weights)
        sets.append((*in_slices, *last, offload))
    sets.append((*in_slices, *last, offload, "structured_pruning"))
    return list(dict.fromkeys(sets))


def search(
    settings: RunSettings,
    target: Target,
    budget_bytes: int | None,
    progress: Callable[[list[tuple[str, ...]]], Iterator[tuple[str, ...]]] = iter,
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
    smallest = trials.candidate(names, sizes[0])
    if budget_bytes is None or chosen is not None or smallest.needs_bytes > budget_bytes:
        return smallest
    fitting = bisect_right(sizes, budget_bytes, key=lambda size: trials.candidate(names, size).needs_bytes)
    return trials.candidate(names, sizes[fitting - 1])


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
