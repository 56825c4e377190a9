"""What is asked of a compression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from leanbert.errors import UserError
from leanbert.ranges import POSITIVE
from leanbert.units import parse_size


@dataclass(frozen=True, kw_only=True)
class CompressRequest:
    """What is asked of a compression."""

    output: Path
    """Folder to write: each variant in a folder of its own, report.md, report.json, pareto.png and tensorboard."""
    steps: list[str] | None = None
    """What to do to the model, in this order: blocks=FRACTION (that leaves), structured_pruning=FRACTION (of heads and
    feed-forward neurons; FRACTION:taylor, by gradients), pruning=FRACTION (of single weights; FRACTION:SIZE, of square
    blocks; 2:4 or 4:8) or movement_pruning (the same, while training), quantization_aware=SCHEME (training rounds
    weights as the last step will), train=STEPS (what was cut learns from the whole model, see model.distillation),
    low_rank=FRACTION (of the outputs' energy that stays), low_rank_embedding=FRACTION, quantize=SCHEME: int8, int4,
    int8_int4 (products in int8, embeddings in int4) or int8_static. Each is reported with those before it. Default:
    several short lists, without training."""
    exceptions: list[str] | None = None
    """Layers that quantization leaves in 32 bits, such as encoder.blocks.0.attention.qkv. Default: none, or with steps
    and max_drop as many of the most sensitive as keep it."""
    sensitivity: bool = False
    """Report too what each layer costs that is quantized alone: an evaluation for each."""
    search: bool = False
    """Train smaller ones too, each for trainer.max_steps, until one keeps the limits."""
    max_size: str | None = None
    """Largest file that you can ship, such as 5MiB."""
    max_latency: str | None = None
    """Longest time for one text of 32 tokens, such as 4ms: the median on this machine."""
    max_drop: str | None = None
    """Largest relative loss of checkpoint.monitor on the validation set, such as 1%."""
    seconds: float = 3.0
    """Time to measure each variant for, in turns with the others."""

    def limits(self) -> Limits:
        """Return the limits. Raises `UserError` for a text that is none."""
        POSITIVE.check("seconds", self.seconds)
        return Limits(
            None if self.max_size is None else parse_size(self.max_size, "max_size"),
            None if self.max_latency is None else _parse("max_latency", self.max_latency, "ms", "4ms") / 1e3,
            None if self.max_drop is None else _parse("max_drop", self.max_drop, "%", "1%") / 100,
        )


@dataclass(frozen=True)
class Limits:
    """What a variant may need: bytes, seconds, and a fraction of the metric; None: as it comes."""

    size_bytes: int | None = None
    latency_seconds: float | None = None
    drop: float | None = None

    @property
    def any(self) -> bool:
        """Whether there are some."""
        return any(limit is not None for limit in vars(self).values())


def _parse(setting: str, text: str, unit: str, example: str) -> float:
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*{unit}\s*", text)
    if match is None:
        raise UserError(f"{setting}: {text!r} is no such limit. Give a number with its unit, such as {example}")
    return float(match[1])
