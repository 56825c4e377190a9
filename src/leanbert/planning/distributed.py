"""What a run on several devices will need on each, and what each will send: the balance of DDP and FSDP2.

DDP (Li et al. 2020, VLDB) has the whole model on each device and sums gradients once per step. FSDP2 (ZeRO's stage 3,
Rajbhandari et al. 2020) has 1/n of parameters, gradients and optimizer state on each, and gathers the parameters of a
block before each of its passes: 1.5 times as much is sent if there is one micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from leanbert.errors import UserError
from leanbert.planning.predict import Prediction, predict
from leanbert.planning.run_settings import RunSettings


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
    shared = replace(settings, rows=settings.rows or _share(settings, devices), devices=devices, strategy=strategy)
    return predict(shared)


def _share(settings: RunSettings, devices: int) -> int:
    batch = settings.rows_per_step
    if devices < 1 or batch % devices:
        raise UserError(
            f"data.batch_size: {batch} is the batch over all devices and not divisible by their number ({devices}). "
            f"Set a multiple of {devices}."
        )
    return batch // devices
