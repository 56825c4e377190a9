"""What a trace of live bytes says: peaks by phase and category, bytes over time, what each layer keeps.

Letters: E events, C categories.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

CATEGORIES = ("parameters", "optimizer", "gradients", "activations", "other")
"""From those that stay longest to those that come and go: the order in which figures stack them."""

PHASES = ("forward", "backward", "optimizer", "validation")


@dataclass(eq=False)
class Storage:
    """The memory behind one tensor and its views.

    `module` is the name of the module whose forward made it, or of the parameter it belongs to; `phase` is that in
    which it was made, empty if it was there before; `shape` and `dtype` are those of the tensor it was first seen with.
    """

    category: str
    module: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    size_bytes: int


class Event(NamedTuple):
    """At operation number `operation`, in `phase`, `storage` grew by `delta_bytes`; None: a phase begins."""

    operation: int
    phase: str
    storage: Storage | None
    delta_bytes: int


class Timeline:
    """Live bytes by category after each event of a trace.

    Args:
        start: What was live before the first event.
        events: All that followed, in order; the first begins a phase.

    Attributes:
        operations: Number of the operation of each event, int64 [E].
        phases: Phase of each event, [E].
        live: Bytes by category after each event, in the order of `CATEGORIES`, int64 [E, C].

    """

    def __init__(self, start: Iterable[Event], events: Sequence[Event]) -> None:
        column = {category: index for index, category in enumerate(CATEGORIES)}
        self.start, self.events = list(start), list(events)
        self.operations = np.array([event.operation for event in events], dtype=np.int64)
        self.phases = [event.phase for event in events]
        self.live: npt.NDArray[np.int64] = np.zeros((len(events), len(CATEGORIES)), dtype=np.int64)
        for row, event in [*((0, event) for event in self.start), *enumerate(events)]:
            if event.storage is not None:
                self.live[row, column[event.storage.category]] += event.delta_bytes
        self.live = self.live.cumsum(axis=0)

    def with_state_before(self) -> Timeline:
        """Return the second step's timeline from the first's, which made the optimizer's state: it is there before."""
        sizes: Counter[int] = Counter()
        for event in self.events:
            if event.storage is not None and event.storage.category == "optimizer":
                sizes[id(event.storage)] += event.delta_bytes
        known = {id(event.storage) for event in self.start}
        made = {key for key, size in sizes.items() if size > 0 and key not in known}
        moved = {id(event.storage): event for event in self.events if id(event.storage) in made}
        start = [Event(0, self.phases[0], event.storage, sizes[key]) for key, event in moved.items()]
        return Timeline([*self.start, *start], [event for event in self.events if id(event.storage) not in made])

    @property
    def totals(self) -> npt.NDArray[np.int64]:
        """Live bytes after each event, int64 [E]."""
        return self.live.sum(axis=1)

    @property
    def peak_bytes(self) -> int:
        """The largest number of live bytes."""
        return int(self.totals.max())

    @property
    def by_category(self) -> dict[str, int]:
        """Bytes by category at the peak; their sum is `peak_bytes`."""
        return self._categories(int(self.totals.argmax()))

    @property
    def by_phase(self) -> dict[str, int]:
        """The peak of each phase that occurred."""
        return {name: sum(categories.values()) for name, categories in self.categories_by_phase.items()}

    @property
    def categories_by_phase(self) -> dict[str, dict[str, int]]:
        """Bytes by category at the peak of each phase that occurred."""
        phases, totals, found = np.array(self.phases), self.totals, {}
        for name in PHASES:
            if name in self.phases:
                found[name] = self._categories(int(np.where(phases == name, totals, -1).argmax()))
        return found

    def _categories(self, row: int) -> dict[str, int]:
        return dict(zip(CATEGORIES, self.live[row].tolist(), strict=True))

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """(phase, first operation, last operation) of each stretch of one phase, in order."""
        spans: list[tuple[str, int, int]] = []
        for name, rows in groupby(range(len(self.phases)), self.phases.__getitem__):
            operations = self.operations[list(rows)]
            spans.append((name, int(operations[0]), int(operations[-1])))
        return spans

    @property
    def saved(self) -> list[Storage]:
        """The activations that the forward pass left for the (first) backward pass."""
        kept: dict[int, Storage] = {}
        for event in self.events:
            if event.phase == "backward":
                break
            if event.storage is not None and event.storage.category == "activations":
                kept[id(event.storage)] = event.storage
                if event.delta_bytes < 0:
                    del kept[id(event.storage)]
        return list(kept.values())


def layer_of(module: str) -> tuple[str, str]:
    """Split a module's name into layer and part: `encoder.blocks.3.attention.qkv` is of block 3, its attention."""
    numbered = re.match(r"(.*?\.\d+)(?:\.([^.]+))?(?:\.|$)", module)
    if numbered:
        return numbered[1], numbered[2] or "itself"
    names = module.split(".") if module else ["outside the model"]
    depth = 2 if names[0] in ("encoder", "decoder") else 1
    return ".".join(names[:depth]), names[depth] if len(names) > depth else "itself"


LAYER_COLUMNS = ("layer", "MiB", "share", "parts (MiB)")


def layer_rows(saved: Iterable[Storage]) -> list[tuple[str, str, str, str]]:
    """Return what each layer keeps for the backward pass, and the sum, as rows of a table of `LAYER_COLUMNS`."""
    layers: dict[str, Counter[str]] = {}
    for storage in saved:
        layer, part = layer_of(storage.module)
        layers.setdefault(layer, Counter())[part] += storage.size_bytes
    total = sum(sum(parts.values()) for parts in layers.values())
    rows: list[tuple[str, str, str, str]] = []
    for layer, parts in layers.items():
        size = sum(parts.values())
        detail = ", ".join(f"{part} {_mib(count)}" for part, count in parts.most_common())
        rows.append((layer, _mib(size), f"{size / total:.1%}", detail))
    return [*rows, ("total", _mib(total), "", "")]


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.2f}"
