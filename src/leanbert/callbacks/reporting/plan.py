"""Predicted against measured memory of a run that was planned."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.reporting.memory_monitor import MemoryMonitor
from leanbert.callbacks.values import callbacks_of, log_values
from leanbert.measure.counters import device_bytes, peak_rss_bytes
from leanbert.messages import say
from leanbert.units import MIB, format_size

TOLERANCE_PERCENT = 10.0
"""Error of the prediction above which the run says so."""


class PlanReport(Callback):
    """Log what was predicted, what was measured, and the error; on CUDA hold the process to its budget.

    Args:
        predicted_bytes: Peak of live tensors in training steps and validation.
        plan: The whole plan as `plan --json` writes it, also for the run's folder.

    """

    def __init__(self, predicted_bytes: int, plan: dict[str, Any]) -> None:
        self.predicted_bytes, self.plan = predicted_bytes, plan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bound what the CUDA allocator may take: the budget without what the context takes, as planned."""
        device, budget = trainer.strategy.root_device, self.plan["budget_bytes"]
        if device.type == "cuda" and budget is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, (budget - self.plan["process_base_bytes"]) / total)
            torch.cuda.set_per_process_memory_fraction(share, device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, log, and warn if the prediction was wrong."""
        measured = self.measured_bytes(trainer)
        values = {"memory/plan/predicted_mib": self.predicted_bytes / MIB}
        if measured is not None:
            values["memory/plan/error_percent"] = error_percent(self.predicted_bytes, measured)
        log_values(trainer, values)
        self._say(trainer, measured)

    def measured_bytes(self, trainer: Trainer) -> int | None:
        """Return the measured peak of live tensors, if the device counts them or a monitor has sampled a step."""
        peak = device_bytes(trainer.strategy.root_device).get("peak")
        monitors = callbacks_of(trainer, MemoryMonitor)
        return monitors[0].summary().get("peak_bytes") if peak is None and monitors else peak

    def _say(self, trainer: Trainer, measured: int | None) -> None:
        pairs = [] if measured is None else [("live tensors", self.predicted_bytes, measured)]
        if trainer.strategy.root_device.type == "cpu":
            pairs.append(("resident", self.plan["predicted_needs_bytes"], peak_rss_bytes()))
        for name, predicted, found in pairs:
            error = error_percent(predicted, found)
            sizes = f"predicted {format_size(predicted)}, measured {format_size(found)}"
            say(f"Plan         {name}: {sizes} ({error:+.1f} %)")
            if abs(error) > TOLERANCE_PERCENT:
                say(f"warning: the plan of {name} was wrong by {abs(error):.0f} %. Leave more of a margin.")


def error_percent(predicted: float, measured: float) -> float:
    """Return by how many percent of the measured value the prediction is too high."""
    return 100.0 * (predicted / measured - 1.0)
