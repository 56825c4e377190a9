"""The profile of a device from the folders of runs on it: what they logged of memory and time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanbert.errors import UserError
from leanbert.planning.profile import LoggedRun, fit_profile, write_profile
from leanbert.units import MIB

RESERVED, USED = "memory/reserved_mib", "memory/device_used_mib"


def read_run(folder: Path) -> LoggedRun:
    """Return what a run of `fit --budget` with a MemoryMonitor has logged on CUDA. Raises UserError if it has not."""
    try:
        summary, plan = (json.loads((folder / name).read_text()) for name in ("summary.json", "plan.json"))
    except OSError as error:
        raise UserError(f"{error.filename}: is missing. Give folders of runs of fit --budget") from error
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    missing = [tag for tag in (RESERVED, USED) if tag not in events.Tags()["scalars"]]
    if missing or summary["tokens_per_second"] is None:
        what = missing[0] if missing else "tokens_per_second"
        raise UserError(f"{folder}: has no {what}. Give runs on CUDA of more than 10 steps, with a MemoryMonitor")
    reserved, used = ({event.step: event.value for event in events.Scalars(tag)} for tag in (RESERVED, USED))
    return LoggedRun(
        device=summary["device"],
        precision=summary["precision"],
        live_bytes=summary["peak_bytes"],
        reserved_bytes=round(max(reserved.values()) * MIB),
        context_bytes=round(min(used[step] - reserved[step] for step in used.keys() & reserved.keys()) * MIB),
        flops=plan["flops_per_step"],
        seconds=summary["tokens"] / summary["steps"] / summary["tokens_per_second"],
    )


def write_fitted(folders: Sequence[Path], output: Path) -> Path:
    """Fit the profile of the device that all runs were on, and return its file in the folder `output`."""
    return write_profile(fit_profile([read_run(folder) for folder in folders]), output)
