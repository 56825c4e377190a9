from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from leanbert.callbacks.reporting.progress import ProgressBar


def test_a_line_has_the_values_of_its_step_and_is_written_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("on_train_batch_start", "on_train_batch_end", "on_validation_end"):
        monkeypatch.setattr(TQDMProgressBar, name, lambda *_: None)
    bar, batch, metrics = ProgressBar(), (None, None, 0), {"loss": 6.5}
    bar.as_lines = True
    trainer: Any = SimpleNamespace(
        global_step=50, max_steps=200, progress_bar_metrics=metrics, state=SimpleNamespace(fn="fit")
    )
    bar.on_train_batch_end(trainer, None, *batch)  # type: ignore[arg-type]
    metrics["loss"] = 5.5  # as another callback logs it, that comes later
    bar.on_train_batch_start(trainer, None, None, 1)  # type: ignore[arg-type]
    trainer.global_step = 100
    bar.on_train_batch_end(trainer, None, *batch)  # type: ignore[arg-type]
    bar.on_validation_end(trainer, None)  # type: ignore[arg-type]
    bar.on_train_batch_start(trainer, None, None, 1)  # type: ignore[arg-type]
    trainer.global_step = 101
    bar.on_train_batch_end(trainer, None, *batch)  # type: ignore[arg-type]
    bar.on_train_batch_start(trainer, None, None, 1)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "step 50/200  loss 5.5\nstep 100/200  loss 5.5\n"
