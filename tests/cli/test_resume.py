"""Runs that are stopped and go on: subprocesses, signals, and what is left on disk."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from leanbert import signals
from leanbert.optim.schedule import ScheduleConfig, learning_rate_factor
from tests import launcher
from tests.cli.program import command, environment, run
from tests.corpus import write_corpus
from tests.training import TINY, fit
from tests.training import read_scalars as scalars

pytestmark = pytest.mark.usefixtures("launcher_socket")

RESUME = [
    *TINY, "--data.train_files=train.txt", "--trainer.max_steps=24", "--trainer.val_check_interval=6",
    "--checkpoint.every_n_steps=3", "--model.encoder.dropout=0.1",
    "--model.encoder.attention_dropout=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(corpus):
    run(corpus, "fit", *RESUME, "--trainer.default_root_dir=undisturbed")
    return scalars(corpus / "undisturbed" / "mlm" / "version_0")


def start(corpus, *arguments):
    """Start a process of its own, which signals reach."""
    return subprocess.Popen(
        command(launcher.PROGRAM, *arguments), cwd=corpus, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def same_losses(expected, actual):
    for tag in ("train/loss", "train/learning_rate", "val/loss", "val/accuracy"):
        assert actual[tag] == expected[tag], tag


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "seen", [6, pytest.param(15, marks=pytest.mark.slow)]
)  # right after a validation is due, and in the middle
def test_a_killed_run_goes_on_as_if_nothing_had_happened(corpus, undisturbed, workers, seen):
    root = f"killed-{workers}-{seen}"
    settings = [*RESUME, f"--trainer.default_root_dir={root}", f"--data.num_workers={workers}"]
    process = start(corpus, "fit", *settings)
    checkpoints = corpus / root / "mlm" / "version_0" / "checkpoints"
    wait_for(checkpoints / f"step-{seen:08d}.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkpoints / "step-00000024.ckpt").exists(), "killed too late to test anything"
    run(corpus, "fit", *settings, "--ckpt_path=last")
    assert [path.name for path in (corpus / root / "mlm").iterdir()] == ["version_0"]
    same_losses(undisturbed, scalars(corpus / root / "mlm" / "version_0"))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_prints_the_command_that_goes_on(corpus, undisturbed, number):
    settings = [*RESUME, f"--trainer.default_root_dir=interrupted-{number}"]
    process = start(corpus, "fit", *settings)
    folder = corpus / f"interrupted-{number}" / "mlm" / "version_0"
    wait_for(folder / "checkpoints" / "step-00000003.ckpt", process)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert errors.strip().splitlines()[-1].strip().endswith("--ckpt_path last"), errors
    assert "Traceback" not in errors
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    run(corpus, "fit", *settings, "--ckpt_path=last")
    same_losses(undisturbed, scalars(folder))
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_a_signal_before_the_first_checkpoint_says_that_nothing_is_saved(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(signals, "hint", lambda words: found.extend([words(), words]))
    write_corpus(tmp_path / "train.txt")
    fit(tmp_path, steps=1)
    before, words = found
    assert before == "Nothing is saved yet. Give the same command again."
    assert words().startswith("To go on:\n  ")
    assert words().endswith("--trainer.max_steps=1 --ckpt_path last")


def test_a_finished_run_is_extended(corpus):
    """Rates are those of the longer schedule at each step, the losses those of a run with these rates."""
    schedule = ["--model.schedule.name=constant", "--model.schedule.warmup_steps=2"]
    settings = [*RESUME, *schedule, "--trainer.default_root_dir=extended"]
    run(corpus, "fit", *settings, "--trainer.max_steps=8")
    run(corpus, "fit", *settings, "--trainer.max_steps=12", "--ckpt_path=last")
    run(corpus, "fit", *settings, "--trainer.max_steps=12", "--trainer.default_root_dir=straight")
    extended = scalars(corpus / "extended" / "mlm" / "version_0")["train/loss"]
    assert extended == scalars(corpus / "straight" / "mlm" / "version_0")["train/loss"]
    assert set(extended) == set(range(1, 13))


@pytest.mark.slow
def test_an_extended_run_takes_the_rates_of_the_longer_schedule(corpus):
    settings = [*RESUME, "--model.schedule.warmup_steps=2", "--trainer.default_root_dir=stretched"]
    run(corpus, "fit", *settings, "--trainer.max_steps=6")
    run(corpus, "fit", *settings, "--trainer.max_steps=20", "--ckpt_path=last", "--model.optimizer.lr=1e-3")
    rates = scalars(corpus / "stretched" / "mlm" / "version_0")["train/learning_rate"]
    config = ScheduleConfig(warmup_steps=2)
    expected = [3e-3 * learning_rate_factor(config, step, 6) for step in range(6)]
    expected += [1e-3 * learning_rate_factor(config, step, 20) for step in range(6, 20)]
    assert [rates[step] for step in range(1, 21)] == pytest.approx(expected)


def test_going_back_sets_later_checkpoints_aside(corpus):
    settings = [*RESUME, "--trainer.default_root_dir=back", "--trainer.max_steps=9", "--checkpoint.keep=3"]
    run(corpus, "fit", *settings)
    folder = corpus / "back" / "mlm" / "version_0" / "checkpoints"
    run(corpus, "fit", *settings, f"--ckpt_path={folder / 'step-00000003.ckpt'}", "--trainer.max_steps=5")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "abandoned-best.ckpt", "abandoned-step-00000006.ckpt", "abandoned-step-00000009.ckpt", "best.ckpt",
        "step-00000003.ckpt", "step-00000005.ckpt",
    ]  # fmt: skip
