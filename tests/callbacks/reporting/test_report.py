from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanbert.callbacks.reporting import report
from leanbert.callbacks.reporting.report import _warn_of_unknown


def data(train: float, val: float, tokenizer: str | None = None) -> Any:
    shares = {"train": SimpleNamespace(unknown_fraction=train), "val": SimpleNamespace(unknown_fraction=val)}
    return SimpleNamespace(statistics=shares, hparams={"tokenizer": tokenizer})


def test_much_unknown_text_is_told_with_what_to_do() -> None:
    assert _warn_of_unknown(data(0.0, 0.01)) == []
    (line,) = _warn_of_unknown(data(0.02, 0.33))
    assert "33% of the tokens of val are unknown" in line
    assert "data.tokenizer_kind bpe (byte-level, it knows all text) or unigram" in line
    assert "set another data.tokenizer" in _warn_of_unknown(data(0.5, 0.0, "vocab.txt"))[0]


def test_no_steps_are_left_where_fewer_are_asked_for_than_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(hparams={"batch_size": 8, "max_length": 32}, batches_per_epoch=10)
    monkeypatch.setattr(report, "data_of", lambda trainer: data)
    monkeypatch.setattr(report, "describe_corpora", lambda data: [])
    config = SimpleNamespace(preset="modern", num_layers=1, hidden_size=8)
    model = SimpleNamespace(config=config, token_tables=[("tokens", 64)], num_parameters=9)
    task: Any = SimpleNamespace(model=model, distillation=None, device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(estimated_stepping_batches=40, global_step=60, world_size=1, precision="32-true")
    assert report.start_report(trainer, task, None)[-1] == "run         0 steps of 8 x 32 tokens = 0.00 epochs"
