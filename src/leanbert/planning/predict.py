"""What a run will need, before anything is allocated: peaks by phase and category of a step's dry run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from leanbert.distributed.communication import ring_bytes
from leanbert.planning.dry_run import dry_run
from leanbert.planning.run_settings import RunSettings


@dataclass(frozen=True)
class Prediction:
    """Peaks of live tensors: bytes by category at the highest point of each phase; and what a step computes.

    `flops` counts the matrix products of one step on one device, `parameters` those of the model. `gradient_bytes` are
    those of all its gradients; `collectives` the bytes that each device sends in a step, by kind.
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
    def sent_bytes(self) -> int:
        """Bytes that each device sends in an optimizer step; without those of the number of targets and of the loss."""
        return sum(self.collectives.values())

    @property
    def by_category(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        return max(self.phases.values(), key=lambda categories: sum(categories.values()))


def predict(settings: RunSettings) -> Prediction:
    """Return what a run with these settings will need on each device.

    Raises:
        UserError: Techniques that cannot combine, or match nothing.

    """
    rows, whole = rows_of_dry_run(settings), settings.rows_per_step
    run = dry_run(settings, rows)
    phases = run.step.categories_by_phase
    for categories in phases.values():  # the rest of the batch waits
        categories["other"] += (whole - rows) * settings.row_bytes
    phases.update(run.validation.categories_by_phase)
    reduced = run.gradient_bytes if settings.devices > 1 and settings.mesh is None else 0
    for categories in phases.values():  # DDP's buckets: a copy of all gradients, from the first step to the end
        categories["gradients"] += reduced
    micro_batches = _micro_batches(settings, whole) / _micro_batches(settings, rows)
    collectives = Counter({kind: round(size * micro_batches) for kind, size in run.passes_bytes.items()})
    collectives.update(run.update_bytes)
    collectives.update({"all_reduce": ring_bytes("all_reduce", reduced, settings.devices)} if reduced else {})
    flops = round(run.flops * whole / rows) + run.update_flops
    return Prediction(phases, flops, run.parameters, run.gradient_bytes, dict(collectives))


def rows_of_dry_run(settings: RunSettings) -> int:
    """Return the sequences of two micro-batches: the second finds gradients of the first, as do all that follow."""
    micro_batch = settings.techniques.micro_batch
    return settings.rows_per_step if micro_batch is None else min(settings.rows_per_step, 2 * micro_batch)


def _micro_batches(settings: RunSettings, rows: int) -> int:
    """Return how many micro-batches `rows` sequences make."""
    size = settings.techniques.micro_batch
    return 1 if size is None else -(-rows // size)
