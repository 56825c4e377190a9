"""Which rank says what is wrong, and with which exit code."""

from __future__ import annotations

import pytest

from leanbert.cli import ending
from leanbert.errors import TrainingFailed, UserError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1."
LATE = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation"
)


@pytest.fixture
def waits(monkeypatch):
    """Seconds that were waited."""
    found = []
    monkeypatch.setattr(ending.time, "sleep", found.append)
    monkeypatch.setattr(ending.signals, "defer_to", lambda receiver: None)
    monkeypatch.setattr(ending.signals, "end_at_once", lambda code, words: ending.sys.exit(code))
    return found


@pytest.mark.parametrize(
    ("rank", "local", "error", "code", "says", "waited"),
    [
        (0, 0, UserError("a.b: is bad."), 2, "error: a.b: is bad.", []),
        (0, 0, TrainingFailed("no end."), 1, "error: no end.", []),
        (1, 1, UserError("a.b: is bad."), 2, "error: rank 1: a.b: is bad.", [4.0]),
        (4, 0, UserError("a.b: is bad."), 2, "error: rank 4: a.b: is bad.", [3.0]),
        (0, 0, RuntimeError(GLOO), 1, "error: another rank has ended, or cannot be reached. A training", [10.0]),
        (0, 0, RuntimeError(LATE), 1, "error: another rank has not answered in time: it hangs, or cannot be", [10.0]),
        (0, 0, RuntimeError("Application timeout caused pair closure"), 1, "error: another rank has not ans", [10.0]),
        (3, 1, RuntimeError(GLOO), 1, "error: rank 3: another rank has ended, or cannot be reached.", [10.0, 4.0]),
    ],
)
def test_the_first_rank_speaks_and_others_where_it_does_not(
    capsys, monkeypatch, waits, rank, local, error, code, says, waited
):
    monkeypatch.setattr(ending, "rank", lambda: rank)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with pytest.raises(SystemExit) as ended, ending.one_line_errors():
        raise error
    assert ended.value.code == code
    words = capsys.readouterr().err
    assert words.startswith(says)
    assert words.count("\n") == 1
    assert waits == waited


def test_an_error_of_the_program_is_raised_as_it_is(waits):
    with pytest.raises(RuntimeError, match="size mismatch"), ending.one_line_errors():
        raise RuntimeError("size mismatch")
    assert waits == []
