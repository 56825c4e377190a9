"""What devices send each other and how long they wait for it, and the memory of the one that has least left."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.values import log_values
from leanbert.distributed.communication import CommunicationTrace
from leanbert.measure.counters import device_bytes, rss_bytes
from leanbert.ranges import COUNT
from leanbert.units import MIB

FIRST_STEP = 3
"""The first sampled step of a run: `MemoryMonitor` samples the second."""


class CommunicationMonitor(Callback):
    """Log what several devices send each other in a step, and how much of the step they wait for it.

    Sampled are, on all devices, the third step and all that `every_n_steps` divides. What is logged:
    `communication/bytes_per_step`, which each device sends, counted as in a ring (DDP, FSDP2 and the global norm
    alike); `communication/wait_share`, the part of the step in which something is sent and nothing computed (on a CPU
    in which the thread that computes does not run), the mean over devices; and `memory/fullest_device_mib`, the peak of
    the device with the highest one (on CPU its resident memory). On a single device nothing is logged.

    Args:
        every_n_steps: Steps between two samples.

    Raises:
        UserError: `every_n_steps` is not positive.

    """

    def __init__(self, every_n_steps: int = 100) -> None:
        COUNT.check("CommunicationMonitor.every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self._trace: CommunicationTrace | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Begin a sample when one is due."""
        step = trainer.global_step + 1
        if trainer.world_size > 1 and (step == FIRST_STEP or step % self.every_n_steps == 0):
            self._trace = CommunicationTrace(trainer.strategy.root_device.type).__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """End the sample, and log."""
        if self._trace is None:
            return
        trace = self._end()
        device = trainer.strategy.root_device
        peak = device_bytes(device).get("peak", rss_bytes())
        waited = torch.tensor(trace.wait_share, device=device)
        fullest = torch.tensor(peak / MIB, device=device, dtype=torch.float32)
        log_values(trainer, {
            "communication/bytes_per_step": trace.sent_bytes,
            "communication/wait_share": float(trainer.strategy.reduce(waited, reduce_op="mean")),
            "memory/fullest_device_mib": float(trainer.strategy.reduce(fullest, reduce_op="max")),
        })  # fmt: skip

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting."""
        if self._trace is not None:
            self._end()

    def _end(self) -> CommunicationTrace:
        trace, self._trace = self._trace, None
        assert trace is not None
        trace.__exit__()
        return trace
