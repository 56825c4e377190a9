"""Ctrl-C and SIGTERM end a run between two steps, with a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert import signals
from leanbert.callbacks.loop.checkpoint import ASK_RANKS_EVERY, RunCheckpoint
from leanbert.callbacks.values import callbacks_of
from leanbert.messages import leads


class Interrupted(Exception):  # noqa: N818 - not an error
    """The user or the scheduler asked the run to stop, and its state is saved."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(signal.Signals(signal_number).name)


class StopBetweenSteps(Callback):
    """On the first signal finish the step, save and raise `Interrupted`; a second one ends at once.

    A step is never cut in half: weights and optimizer state in the checkpoint belong together. A signal during
    validation waits for its end and for one more step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._restore = signals.nothing

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first signal from here on."""
        self._restore = signals.install()
        signals.defer_to(self._receive)

    def _receive(self, number: int) -> None:
        self.received = number
        if leads():
            signals.write(
                f"{signal.Signals(number).name}: stopping after this step, or this validation and a step "
                "(again: at once)"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Stop here if asked to, on all ranks together."""
        received = self.received or 0
        if trainer.world_size > 1:
            if trainer.global_step % ASK_RANKS_EVERY:
                return
            ranks = trainer.strategy.all_gather(torch.tensor(received, device=pl_module.device))
            received = int(ranks.max())
        if received:
            for checkpoint in callbacks_of(trainer, RunCheckpoint):
                checkpoint.save(trainer)
                checkpoint.finish(trainer)
            raise Interrupted(received)

    def teardown(self, *_: Any, **__: Any) -> None:
        """Give the signals back."""
        signals.defer_to(None)
        self._restore()
        self._restore = signals.nothing

    on_exception = teardown
