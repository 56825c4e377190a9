"""What a run tells while it goes: values to its loggers, and progress on standard error, which is a bar on a terminal.

Standard output carries results only.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from leanbert.messages import say

LINE_EVERY_STEPS = 50


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which names `sys.stdout` where it is made, on standard error; lines where that is a file."""

    def __init__(self) -> None:
        self.as_lines = not sys.stderr.isatty()
        super().__init__(refresh_rate=0 if self.as_lines else 1)  # 0 disables the bars

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or write a line now and then."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.as_lines and trainer.global_step % LINE_EVERY_STEPS == 0:
            self._write_line(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the bar, or write a line."""
        super().on_validation_end(trainer, pl_module)
        if self.as_lines and trainer.state.fn == "fit":
            self._write_line(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bars away, so that the last lines are those that tell what happened."""
        for bar in list(getattr(Tqdm, "_instances", ())):
            bar.close()

    @staticmethod
    def _write_line(trainer: Trainer) -> None:
        values = "  ".join(f"{name} {value:g}" for name, value in trainer.progress_bar_metrics.items())
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        say(f"step {trainer.global_step}{total}  {values}")

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of training."""
        with redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        """Return the bar of validation."""
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()

    def init_test_tqdm(self) -> Tqdm:
        """Return the bar of testing."""
        with redirect_stdout(sys.stderr):
            return super().init_test_tqdm()

    def init_predict_tqdm(self) -> Tqdm:
        """Return the bar of prediction."""
        with redirect_stdout(sys.stderr):
            return super().init_predict_tqdm()

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return what the bar shows beside its count."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
