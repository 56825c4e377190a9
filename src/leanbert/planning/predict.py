"""What a run will need, before anything is allocated: peaks by phase and category of a step's dry run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from leanbert.distributed.communication import ring_bytes
from leanbert.distributed.sharding import pretend_group
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


TEACHER = "teacher"
"""Phase before the first step, in a run that does not find a teacher's outputs on disk yet."""


def predict(settings: RunSettings) -> Prediction:
    """Return what a run with these settings will need on each device, and what each sends in a step.

    The dry run of FSDP2 is that of rank 0 of a process group that is not there, with blocks and model sharded as in
    `shard`; its collectives are counted. The dry run of DDP is that of one device, for DDP's reducer reads tensors
    that have no values in a dry run; its buckets are added, which are reduced once per step, however many micro-batches
    there are (`no_sync`).

    Raises:
        UserError: Techniques that cannot combine, or match nothing, or this process is part of a distributed run.

    """
    if settings.shards and settings.mesh is None:
        with pretend_group(settings.devices, settings.replicas) as mesh:
            return predict(replace(settings, mesh=mesh))
    rows, whole = rows_of_dry_run(settings), settings.rows_per_step
    run = dry_run(settings, rows)
    phases = run.step.categories_by_phase
    for categories in phases.values():  # the rest of the batch waits
        categories["other"] += (whole - rows) * settings.row_bytes
    phases.update(run.validation.categories_by_phase)
    if run.teacher is not None:
        phases[TEACHER] = run.teacher.categories_by_phase["forward"]
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
