"""What a run tells while it goes: values to its loggers, and progress on standard error, which is a bar on a terminal.

Standard output carries results only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities.types import STEP_OUTPUT

from leanbert.data.batches.batch import Batch
from leanbert.messages import say

LINE_EVERY_STEPS = 50


def _on_stderr(make: Callable[[TQDMProgressBar], Tqdm]) -> Callable[[TQDMProgressBar], Tqdm]:
    def made(progress: TQDMProgressBar) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return make(progress)

    return made


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, which names `sys.stdout` where it is made, on standard error; lines where that is a file."""

    def __init__(self) -> None:
        self.as_lines = not sys.stderr.isatty()
        self._due = False
        super().__init__(refresh_rate=0 if self.as_lines else 1)  # 0 disables the bars

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Write the line of the step before, of which all is logged now, unless a validation has written it."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._due:
            self._write_line(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Advance the bar, or have a line written now and then."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._due = self.as_lines and trainer.global_step % LINE_EVERY_STEPS == 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the bar, or write a line."""
        super().on_validation_end(trainer, pl_module)
        if self.as_lines and trainer.state.fn == "fit":
            self._write_line(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the bars away, so that the last lines are those that tell what happened."""
        for bar in list(getattr(Tqdm, "_instances", ())):
            bar.close()

    def _write_line(self, trainer: Trainer) -> None:
        self._due = False
        values = "  ".join(f"{name} {value:g}" for name, value in trainer.progress_bar_metrics.items())
        total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        say(f"step {trainer.global_step}{total}  {values}")

    init_train_tqdm = _on_stderr(TQDMProgressBar.init_train_tqdm)
    init_validation_tqdm = _on_stderr(TQDMProgressBar.init_validation_tqdm)
    init_test_tqdm = _on_stderr(TQDMProgressBar.init_test_tqdm)
    init_predict_tqdm = _on_stderr(TQDMProgressBar.init_predict_tqdm)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what the bar shows beside its count."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
