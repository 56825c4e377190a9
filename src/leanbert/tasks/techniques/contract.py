"""What is known of a memory technique, what a run asks of techniques, and what they run in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from leanbert.memory.checkpointing import Keep
from leanbert.models.base import EncoderModel

InBackward = Literal["update", "accumulate"]


@dataclass
class Techniques:
    """What the callbacks of a run ask for; the defaults are plain training."""

    structured: tuple[float, float, float] | None = None
    """Fractions of attention heads, feed-forward neurons and blocks that are removed from the new model."""
    removal_step: int = 0
    """Optimizer steps after which they are removed from the model in training; 0: they are not."""
    masks: set[str] = field(default_factory=set)
    """Callbacks that set single weights to zero step by step."""
    gradient_readers: set[str] = field(default_factory=set)
    """Callbacks that look at the gradients of a whole step."""
    rounds: bool = False
    """The model computes with rounded weights, from some step on."""
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
    """16-bit precision, from some step on; None: the trainer's."""
    returns_pages: bool = False
    """Freed memory goes back to the system at once."""
    own: list[Technique] = field(default_factory=list)
    """Techniques that are not among LeanBERT's."""


@dataclass(frozen=True)
class Surroundings:
    """What else decides whether techniques can combine."""

    optimizer: str
    precision: str
    device_type: str = "cpu"
    world_size: int = 1
    shards: bool = False
    offloads: bool = False
    """Shards are in host memory."""
    clips: bool = False
    compiles: bool = False


@dataclass(frozen=True)
class Technique:
    """All that is known of one technique: refusals, plan, OOM report, documents and tests are derived from it."""

    name: str
    """What it is called; LeanBERT's have an overlay `configs/memory/NAME.yaml`."""
    exact: bool
    """Gradients are the same as in plain training."""
    lowers: str
    """Which bytes it lowers, and to what."""
    costs: str
    """What it costs, in words."""
    conflicts: Callable[[Techniques, Surroundings], Iterable[str]] = lambda techniques, around: ()
    """Returns the reasons, each with the fix, why the run cannot have it."""
    apply: Callable[[EncoderModel, Techniques], None] = lambda model, techniques: None
    """Changes a model that has its initial weights, if the techniques ask for it."""
    eases: str | None = None
    """Category of live bytes for which it is advised when memory runs out."""
    rung: Callable[[Surroundings], int | None] = lambda around: None
    """Returns its place in the order of costs in which a plan tries techniques; None: it is not tried there."""
    replaced_by: tuple[str, ...] = ()
    """Names of techniques beside which a plan leaves it out."""
