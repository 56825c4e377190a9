from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
