"""A sample of `benchmarks/faults.py`: kills, damaged inputs, two processes at once, signals; and how it compares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.faults import kills, mutations, references, signals
from benchmarks.faults.forks import Outcome

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_sample_goes_right(tmp_path):
    counts = {"kills": 5, "mutations": 30, "concurrent": 3, "signals": 3, "restarts": 1}
    words = ["benchmarks/faults.py", *counts, "--count", *map(str, counts.values()), f"--output={tmp_path / 'results'}"]
    done = subprocess.run(
        [sys.executable, *words, f"--work={tmp_path}", "--jobs=1"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len((tmp_path / "results").read_text().splitlines()) == sum(counts.values())


def test_one_bit_is_a_difference():
    one = {"weights": [torch.tensor([1.0, 2.0])], "loss": float("nan")}
    assert kills.difference(one, {"weights": [torch.tensor([1.0, 2.0])], "loss": float("nan")}) is None
    other = torch.tensor([1.0, 2.0])
    other.view(torch.int32)[1] ^= 1
    assert kills.difference(one, {"weights": [other], "loss": float("nan")}) == "/weights/0: other tensors"
    assert kills.difference(one, {"weights": one["weights"]}) == ": ['loss'] on one side only"


def test_a_signal_may_leave_other_checkpoints_but_the_last_is_the_same():
    def result(*steps, loss=1.0):
        files = {f"checkpoints/step-{step}.ckpt": True for step in steps}
        return {"files": {"best.ckpt": True, **files}, "summary": {"checkpoint": f"step-{steps[-1]}.ckpt"}} | {
            f"step-{step}.ckpt": {"loss": loss} for step in steps
        }

    at_the_end = signals._at_the_end
    assert kills.difference(at_the_end(result(6, 8)), at_the_end(result(7, 8))) is None
    assert kills.difference(at_the_end(result(6, 8)), at_the_end(result(6, 7))) is not None
    other = kills.difference(at_the_end(result(6, 8)), at_the_end(result(7, 8, loss=2.0)))
    assert other == "/step-8.ckpt/loss: 1.0 and 2.0"


def test_experiments_are_drawn_by_the_seed():
    assert kills.experiments(40, 1) == kills.experiments(40, 1) != kills.experiments(40, 2)
    kinds = {experiment["kind"].split()[0] for experiment in mutations.experiments(90, 0)}
    assert kinds == set(mutations.KINDS)


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("a.txt", "one\ntwo\n\nthree\n", [("one two",), ("three",)]),
        ("a.csv", 'text,label\n"a, b",c\n', [("a, b", "c")]),
        ("a.tsv", 'text\tlabel\n"a\tb\n', [('"a', "b")]),
        ("a.conll", "#\tO\nb c\tB-X\n", [("# b c", "O B-X")]),
        ("a.jsonl", '{"text": "a", "label": 1}\n', [("a", "1")]),
        ("a.csv", "text,label\na,b,c\n", None),
        ("a.csv", 'text,label\n"a,b\n', None),
        ("a.jsonl", '{"text": "a"}\n', None),
    ],
)
def test_independent_readers(tmp_path, name, text, right):
    (tmp_path / name).write_text(text)
    if right is not None:
        assert references.read(tmp_path / name, ("text", "label")[: len(right[0])]) == right
    else:
        with pytest.raises(references.UnreadableError):
            references.read(tmp_path / name, ("text", "label"))


def outcome(code: int, stderr: str) -> Outcome:
    return Outcome(code, "", stderr, 1.0, 1.0, 0)


def test_what_is_against_the_contract():
    assert outcome(2, "Seed set to 0\nerror: a.csv:3: no label. Add it\n").problem is None
    for code, stderr in [(2, "no such file"), (2, "error: a\nerror: b"), (1, "error: a"), (-11, ""), (0, TRACEBACK)]:
        assert outcome(code, stderr).problem is not None
    assert signals.judge(outcome(130, "Stopped by SIGINT.\n"), 130, set()) is None
    for code, stderr, left in [
        (130, "", set()),
        (1, "Stopped by SIGINT", set()),
        (130, "Stopped by SIGINT", {"a.tmp"}),
    ]:
        assert signals.judge(outcome(code, stderr), 130, left) is not None


TRACEBACK = "Traceback (most recent call last):\n  ...\nValueError: a\n"
