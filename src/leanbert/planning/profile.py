"""What runs on a kind of CUDA device were measured to need and to reach: a small file, fitted from their logs.

`benchmarks/plan.py --fit-profile` writes it. The memory of a run is affine in its live tensors, the time of a step in
its operations: a step that computes nothing still takes the start of its kernels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from leanbert.errors import UserError
from leanbert.files import write_text_atomically

FOLDER = Path(__file__).parent / "devices"
"""Profiles that come along, by the name of the device."""


@dataclass(frozen=True)
class LoggedRun:
    """What a run has logged; bytes, seconds and operations, the latter two of a step.

    `live_bytes` is the highest that tensors took, `reserved_bytes` what the allocator held, `context_bytes` the rest of
    what the device had given out.
    """

    device: str
    precision: str
    live_bytes: int
    reserved_bytes: int
    context_bytes: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Steps:
    """Steps take `seconds`, and the time of their operations at `flops_per_second`."""

    seconds: float
    flops_per_second: float


@dataclass(frozen=True)
class Profile:
    """A device: bytes without a single tensor, what the allocator holds on top, and steps by bits of a number."""

    device: str
    base_bytes: int
    slack: float
    steps: dict[str, Steps]
    runs: int

    def check(self, precision: str) -> None:
        """Raise UserError if no run at that precision was measured."""
        if bits(precision) not in self.steps:
            raise UserError(
                f"device: {self.device} was measured in {' and '.join(self.steps)} bits only, not in {precision}. "
                "Set trainer.precision, or fit its profile from such runs too"
            )

    def step_seconds(self, flops: int, precision: str) -> float:
        """Return the seconds of a step."""
        steps = self.steps[bits(precision)]
        return steps.seconds + flops / steps.flops_per_second


def bits(precision: str) -> str:
    """Return 16 or 32: bits of a number in products at a precision of Lightning's, such as bf16-mixed."""
    return "16" if "16" in precision else "32"


def fit_profile(runs: Sequence[LoggedRun]) -> Profile:
    """Return the profile of the device that all `runs` were on; of memory what the most demanding one needed.

    Raises:
        UserError: There are none, they were on several kinds of device, or larger steps did not take longer.

    """
    devices = sorted({run.device for run in runs})
    if len(devices) != 1:
        raise UserError(f"fit-profile: runs on {', '.join(devices) or 'no device'}. Give those of one kind")
    groups = {size: [run for run in runs if bits(run.precision) == size] for size in ("16", "32")}
    return Profile(
        devices[0],
        base_bytes=max(run.context_bytes for run in runs),
        slack=max(run.reserved_bytes / run.live_bytes - 1 for run in runs),
        steps={size: _fit_steps(group) for size, group in groups.items() if group},
        runs=len(runs),
    )


def _fit_steps(runs: Sequence[LoggedRun]) -> Steps:
    """Fit seconds to operations by least squares; through 0 where steps are of one size, or the line would go below."""
    flops, seconds = (np.array([getattr(run, name) for run in runs], dtype=float) for name in ("flops", "seconds"))
    start, slope = 0.0, float(flops @ seconds / (flops @ flops))
    if flops.max() > flops.min():
        steepness, least = np.polyfit(flops, seconds, 1)
        if steepness <= 0:
            raise UserError(
                "fit-profile: larger steps did not take longer. Give runs of several sizes, alone on a device"
            )
        if least > 0:
            start, slope = float(least), float(steepness)
    return Steps(start, 1 / slope)


def slug(device: str) -> str:
    """Return the name of a device's file: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_profile(profile: Profile, folder: Path = FOLDER) -> Path:
    """Write the file of a device, atomically, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(profile.device)}.json"
    write_text_atomically(path, json.dumps(asdict(profile), indent=2) + "\n")
    return path


def read_profile(path: Path) -> Profile:
    """Return what `write_profile` has written. Raises UserError for another file."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        steps = {size: Steps(**own) for size, own in stored.pop("steps").items()}
        return Profile(**stored, steps=steps)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is no profile of a device ({error}). Write it anew with --fit-profile") from error


def find_profile(device: str | None, device_type: str) -> Profile | None:
    """Return the profile of `device`, a file or the name of one that comes along; None: of the CUDA device here.

    None is returned where there is no such profile.
    """
    if device is not None and device.endswith(".json"):
        return read_profile(Path(device))
    if device is None and device_type == "cuda" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    path = FOLDER / f"{slug(device or '')}.json"
    return read_profile(path) if path.is_file() else None
