"""Learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from leanbert.ranges import SHARE, WHOLE, check_ranges

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


@dataclass
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: ScheduleName = "wsd"
    """constant, linear, cosine, or wsd (warm-up, stable, linear decay)."""
    warmup_steps: int = 50
    """Steps of linear warm-up; shortened with a notice if the run is shorter."""
    decay_share: float = 0.5
    """Share of all steps in which wsd decays."""
    final_share: float = 0.0
    """Learning rate at the end, as a share of the peak (linear, cosine, wsd)."""

    def __post_init__(self) -> None:
        """Raise UserError for a value that makes no schedule."""
        ranges = {"warmup_steps": WHOLE, "decay_share": SHARE, "final_share": SHARE}
        check_ranges("model.schedule", vars(self), ranges)


class Schedule(LambdaLR):
    """The learning rate of each step, of this run's settings and length also where a checkpoint brings other ones."""

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> None:
        super().__init__(optimizer, lambda step: learning_rate_factor(config, step, total_steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the step of `state_dict`."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, peak in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * self.lr_lambdas[0](self.last_epoch)


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the share of the peak learning rate used by update number `step` (from 0) of `total_steps`.

    A pure function of both: a finished run that is extended goes on where the longer schedule stands at that step.
    wsd is the warm-up-stable-decay schedule of Hu et al. 2024 (MiniCPM), with a linear decay.
    """
    warmup = effective_warmup(config, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    start = warmup if config.name != "wsd" else max(warmup, round(total_steps * (1 - config.decay_share)))
    progress = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return config.final_share + (1 - config.final_share) * share


def effective_warmup(config: ScheduleConfig, total_steps: int) -> int:
    """Return the warm-up steps, at most a tenth of the run when the setting does not fit into it."""
    if total_steps <= 0 or config.warmup_steps < total_steps:
        return config.warmup_steps
    return total_steps // 10
