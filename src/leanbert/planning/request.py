"""What is asked of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked of a plan."""

    budget: str | None = None
    """Memory that the run may need, such as 8GiB; auto: what the device has free, less a tenth. On a CPU it is resident
    memory."""
    json: Path | None = None
    """File to write the plan to, for programs."""
    save: Path | None = None
    """File to write the chosen techniques to, as an overlay for --config."""
    sweep: list[str] | None = None
    """Print the largest micro-batch that fits the budget for each size and length instead: --sweep
    size=mini,base,large max_length=128,512."""
    figure: Path | None = None
    """Image file to draw the sweep into, such as sweep.png."""
    measure: bool = False
    """Time a few real steps of small stacks of blocks on this device, and say how long the run will take; the corpus is
    prepared first."""
    first: bool = False
    """Stop at the cheapest set of techniques that fits, as `fit --budget` does, instead of trying all."""
    device: str | None = None
    """Estimate the time on a device that need not be here, such as t4, rtx4090, a100, h100-sxm; or by its profile, a
    file that `benchmarks/plan.py --fit-profile` has written, which also says what it needs beyond tensors."""
    share: float = 0.3
    """Fraction of that device's peak that training is taken to reach. ModernBERT-base reports about 0.25 on an H100,
    NVIDIA's own BERT-large 0.45 on an A100; small models reach far less, for they wait for kernels to start."""
