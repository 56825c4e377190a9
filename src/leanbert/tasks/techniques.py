"""All memory techniques of a run in one place: their settings, their order, and what cannot combine.

Callbacks write their settings here before the model is built; the task applies them. The order is that of `apply`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from leanbert.compression.structured import apply_at_build
from leanbert.errors import UserError
from leanbert.memory.checkpointing import Keep, set_checkpointing
from leanbert.memory.offload import DiskStorage, to_host
from leanbert.optim.build import STATE_BITS

InBackward = Literal["update", "accumulate"]


@dataclass
class Techniques:
    """What the callbacks of a run ask for; the defaults are plain training."""

    structured: tuple[float, float] | None = None
    """Shares of attention heads and of feed-forward neurons that are removed from the new model."""
    keep: Keep = "all"
    """Activations that checkpointed blocks keep."""
    keep_every: int = 1
    """Checkpoint every n-th block."""
    slice_rows: int | None = None
    """Layer-major execution: rows that go through a block at a time."""
    storage: Literal["device", "host"] | Path = "device"
    """Where activations wait for the backward pass; a path is a folder on disk."""
    head_chunk: int | None = None
    """Targets whose logits exist at a time."""
    micro_batch: int | None = None
    """Gradient accumulation: sequences of the largest micro-batch on each device; None: it is off."""
    in_backward: InBackward | None = None
    """Update parameters in the backward pass; "accumulate": fold each micro-batch into Adam's moments (AdamA)."""
    recovery: bool = False
    """Replay a step with smaller micro-batches when memory runs out."""
    precision: str | None = None
    """16-bit precision, from some step on; None: that of the trainer."""
    returns_pages: bool = False
    """Freed memory goes back to the system at once."""


@dataclass(frozen=True)
class Surroundings:
    """What else decides whether techniques can combine."""

    optimizer: str
    precision: str
    device_type: str = "cpu"
    world_size: int = 1
    shards: bool = False
    clips: bool = False
    compiles: bool = False


def refuse(techniques: Techniques, around: Surroundings) -> None:
    """Raise UserError, with the reason and the fix, for a combination that cannot work."""
    for wrong, message in _conflicts(techniques, around):
        if wrong:
            raise UserError(message)


def _conflicts(t: Techniques, around: Surroundings) -> list[tuple[bool, str]]:
    layer_major, in_backward = t.slice_rows is not None, t.in_backward is not None
    adama = t.in_backward == "accumulate"
    return [
        (
            t.in_backward == "update" and t.micro_batch is not None,
            "OptimizerInBackward: with gradient accumulation a parameter would be updated after each micro-batch. Use "
            "LayerMajor instead of GradientAccumulation (exact), or OptimizerInBackward.accumulate=true (AdamA).",
        ),
        (
            adama and t.micro_batch is None,
            "OptimizerInBackward.accumulate: has no effect without GradientAccumulation. Leave it out.",
        ),
        (
            adama and around.optimizer not in ("adamw", "adamw8bit"),
            f"OptimizerInBackward.accumulate: AdamA needs Adam's moments, in more than 4 bits, for they are rounded "
            f"after each micro-batch, not {around.optimizer}. Set model.optimizer.name to adamw or adamw8bit.",
        ),
        (
            in_backward and around.clips,
            "OptimizerInBackward: the norm of all gradients is never known. Leave trainer.gradient_clip_val out.",
        ),
        (
            in_backward and around.precision == "16-mixed",
            "OptimizerInBackward: 16-mixed must see all gradients before it updates. Use bf16-mixed or bf16-true.",
        ),
        (
            in_backward and around.world_size > 1,
            "OptimizerInBackward: gradients would be used before the ranks have exchanged them. Use one device.",
        ),
        (
            in_backward and t.recovery,
            "OutOfMemoryRecovery: with OptimizerInBackward some parameters are updated already when memory runs "
            "out. Leave one of them out.",
        ),
        (
            layer_major and (t.micro_batch is not None or t.recovery),
            "LayerMajor: has a micro-batch of its own. Leave GradientAccumulation and OutOfMemoryRecovery out.",
        ),
        (
            layer_major and t.keep != "all",
            "LayerMajor: keeps only the inputs of blocks already. Leave ActivationCheckpointing out.",
        ),
        (
            layer_major and around.shards,
            "LayerMajor: runs blocks inside an autograd function, where sharded parameters are not gathered. Use "
            "ActivationCheckpointing with FSDP2.",
        ),
        (
            t.recovery and around.shards,
            "OutOfMemoryRecovery: sharded ranks exchange parameters inside the failed pass and cannot replay it. "
            "Choose a smaller micro-batch before the run.",
        ),
        (
            around.shards and around.optimizer == "adafactor",
            "model.optimizer.name: torch's adafactor cannot update sharded parameters. Use adamw or muon, or ddp.",
        ),
        (
            around.shards and (around.optimizer in STATE_BITS or around.precision == "bf16-true"),
            "trainer.strategy: updates in slices (adamw8bit, adamw4bit, bf16-true) cannot run on sharded parameters. "
            "Use adamw or muon with 32-true or bf16-mixed, or ddp.",
        ),
        (
            t.keep == "products" and around.compiles,
            "ActivationCheckpointing: a compiled block hides its products from keep=products. Use keep=input.",
        ),
        (
            t.storage == "host" and around.device_type == "cpu",
            "ActivationOffload: on a CPU activations are in host memory already. Use to=disk.",
        ),
    ]


def apply(techniques: Techniques, model: Any, *, compile_blocks: bool = False) -> None:
    """Apply to a model that has its initial weights, in the one order: prune, checkpoint, head, offload, compile."""
    if techniques.structured is not None:
        apply_at_build(model, *techniques.structured)
    if techniques.keep != "all":
        set_checkpointing(model.blocks, techniques.keep, techniques.keep_every)
    for block in model.blocks:
        block.slice_rows = techniques.slice_rows
    model.head_chunk = techniques.head_chunk
    if techniques.storage != "device":
        storage = to_host if techniques.storage == "host" else DiskStorage(techniques.storage)
        for stack in model.stacks:
            stack.storage = storage
    if compile_blocks:
        for block in model.blocks:
            block.compile()
