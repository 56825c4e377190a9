"""What a run on several devices will need on each, and what each will send: the balance of DDP and FSDP2.

DDP (Li et al. 2020, VLDB) has the whole model on each device and sums gradients once per step. FSDP2 (ZeRO's stage 3,
Rajbhandari et al. 2020) has 1/n of parameters, gradients and optimizer state on each, and gathers the parameters of a
block before each of its passes: 1.5 times as much is sent if there is one micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from leanbert.data.settings import rows_per_device
from leanbert.errors import UserError
from leanbert.planning.predict import Prediction, predict
from leanbert.planning.run_settings import RunSettings
from leanbert.units import format_size

Shared = dict[Literal["ddp", "fsdp2"], Prediction | UserError]
"""What each of several devices needs and sends by strategy, or why it cannot be."""


def predict_distributed(settings: RunSettings, devices: int, strategy: Literal["ddp", "fsdp2"]) -> Prediction:
    """Return what a run on `devices` devices will need and send on each.

    Args:
        settings: The run; its batch is shared, unless `settings.rows` says what each device takes.
        devices: All devices, of all nodes.
        strategy: `ddp`, or `fsdp2`, whose micro-batches gather parameters each, and reduce gradients once.

    Raises:
        UserError: The batch cannot be shared, techniques cannot combine with each other or with the strategy, or this
            process is part of a distributed run.

    """
    if devices == 1:
        return predict(settings)
    rows = settings.rows or rows_per_device(settings.rows_per_step, devices)
    return predict(replace(settings, rows=rows, devices=devices, strategy=strategy))


def share_out(settings: RunSettings) -> Shared:
    """Return what each of several devices needs and sends under DDP and FSDP2; {} for one device."""
    found: Shared = {}
    for strategy in ("ddp", "fsdp2") if settings.devices > 1 else ():
        try:
            found[strategy] = predict_distributed(settings, settings.devices, strategy)
        except UserError as error:
            found[strategy] = error
    return found


def describe_sharing(shared: Shared, devices: int) -> list[str]:
    """Return the balance of memory and communication as lines."""
    lines = ["", f"{f'On {devices} devices':<14}{'live on each':>14}{'sent a step':>14}"]
    for strategy, found in shared.items():
        if isinstance(found, UserError):
            lines.append(f"{strategy:<14}  {found}")
        else:
            sizes = (found.peak_bytes, found.sent_bytes)
            lines.append(f"{strategy:<14}" + "".join(f"{format_size(size):>14}" for size in sizes))
    return lines


def sharing_json(shared: Shared, devices: int) -> dict[str, object]:
    """Return the same for programs; bytes are of each device."""
    answer: dict[str, object] = {"count": devices}
    for strategy, found in shared.items():
        if isinstance(found, UserError):
            answer[strategy] = {"refused": str(found)}
        else:
            answer[strategy] = {"predicted_peak_bytes": found.peak_bytes, "sent_bytes_per_step": found.sent_bytes}
    return {"devices": answer}
