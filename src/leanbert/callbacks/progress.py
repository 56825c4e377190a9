"""Progress bars on standard error: standard output carries results only."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(line: str) -> None:
    """Write a line for the reader to standard error, above the progress bars, on the first rank only."""
    Tqdm.write(line, file=sys.stderr)


def _to_stderr(bar: Tqdm) -> Tqdm:
    bar.fp = sys.stderr
    bar.sp = bar.status_printer(sys.stderr)
    return bar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, on standard error."""

    def __init__(self) -> None:
        # a bar that is not on a terminal writes a line at each refresh: keep log files short
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of training."""
        return _to_stderr(super().init_train_tqdm())

    def init_validation_tqdm(self) -> Tqdm:
        """Return the bar of validation."""
        return _to_stderr(super().init_validation_tqdm())

    def init_test_tqdm(self) -> Tqdm:
        """Return the bar of testing."""
        return _to_stderr(super().init_test_tqdm())

    def init_predict_tqdm(self) -> Tqdm:
        """Return the bar of prediction."""
        return _to_stderr(super().init_predict_tqdm())

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return what the bar shows beside its count."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
