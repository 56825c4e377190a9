import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanbert.callbacks.techniques.accumulation import GradientAccumulation, OutOfMemoryRecovery
from leanbert.errors import UserError
from leanbert.tasks.base import Task
from leanbert.tasks.step import StepState
from tests.corpus import write_corpus
from tests.limit import AllocatorLimit
from tests.training import PLAIN, TINY, fit, scalars

ROOT = Path(__file__).parents[3]

MICRO = "accumulation/micro_batch_sequences"
CALLBACK = "leanbert.callbacks.techniques.accumulation.GradientAccumulation"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accumulation")
    write_corpus(folder / "train.txt")
    return folder


def overlay(folder, text):
    path = folder / "overlay.yaml"
    path.write_text("trainer:\n  callbacks+:\n" + text)
    return f"--config={path}"


def schedule(folder, by, entries):
    values = "".join(f"          {start}: {rows}\n" for start, rows in entries.items())
    return overlay(
        folder,
        f"    - class_path: {CALLBACK}\n      init_args:\n        by: {by}\n        micro_batch:\n{values}",
    )


@pytest.mark.parametrize("setting", [0, {0: 4, 10: -1}])
def test_micro_batches_are_positive(setting):
    with pytest.raises(UserError, match=r"^GradientAccumulation\.micro_batch: (0|-1) is out of range"):
        GradientAccumulation(setting)


def test_a_schedule_says_how_to_begin():
    with pytest.raises(UserError, match="how to begin"):
        GradientAccumulation({5: 2})
    with pytest.raises(UserError, match="smallest"):
        OutOfMemoryRecovery(0)


@pytest.fixture(scope="module")
def plain(folder):
    return scalars(fit(folder, steps=6))["train/loss"]


def test_schedule_by_step_changes_nothing_but_the_micro_batch(folder, plain):
    logged = scalars(fit(folder, schedule(folder, "step", {0: 2, 3: 4}), steps=6))
    assert logged[MICRO] == {0: 2.0, 3: 4.0}
    for step, loss in logged["train/loss"].items():
        assert loss == pytest.approx(plain[step], rel=1e-5)


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_a_run_resumed_in_mid_epoch_has_the_micro_batch_of_its_step(folder, by):
    """Lightning's scheduler waits for the next epoch; here a batch of 64 makes an epoch of 7 steps."""
    entries = {0: 2, 3: 4} if by == "step" else {0: 32, 1: 4}
    where = [schedule(folder, by, entries), "--data.batch_size=64", "--checkpoint.every_n_steps=9"]
    whole = fit(folder, *where, steps=12)
    kept = folder / f"{by}.ckpt"
    kept.write_bytes((Path(whole.trainer.log_dir) / "checkpoints" / "step-00000009.ckpt").read_bytes())
    resumed = scalars(fit(folder, *where, f"--ckpt_path={kept}", steps=12))
    assert resumed[MICRO] == {9: 4.0}
    assert resumed["train/loss"] == {step: scalars(whole)["train/loss"][step] for step in (10, 11, 12)}


def peak_of_a_run(folder, *arguments):
    gc.collect()
    with AllocatorLimit(10**12) as limit:
        fit(folder, *arguments, steps=2)
    return limit.peak_bytes


def test_out_of_memory_in_mid_run_loses_nothing(folder, capfd, monkeypatch):
    """From step 3 on memory lies between the peaks of micro-batches 64 and 32: the rest equals a run with 32."""
    rows = ("--data.batch_size=64", "--trainer.limit_val_batches=0")
    whole = peak_of_a_run(folder, *rows)
    smaller = peak_of_a_run(folder, *rows, schedule(folder, "step", {0: 32}))
    assert smaller < 0.8 * whole
    expected = scalars(fit(folder, *rows, schedule(folder, "step", {0: 64, 2: 32}), steps=4))["train/loss"]
    recovery = overlay(folder, "    - class_path: OutOfMemoryRecovery\n")
    gc.collect()
    start = Task._start_micro_batch
    with AllocatorLimit(10**12) as limit:

        def start_with_less_memory(task, index):
            if task.global_step == 2:
                limit.limit_bytes = (whole + smaller) // 2
            start(task, index)

        monkeypatch.setattr(Task, "_start_micro_batch", start_with_less_memory)
        cli = fit(folder, *rows, recovery, steps=4)
    assert limit.raised == 1
    logged = scalars(cli)
    assert logged[MICRO] == {2: 32.0}
    assert logged["accumulation/out_of_memory_events"] == {2: 1.0}
    assert cli.model.step_state.micro_batch == 32
    assert cli.trainer.global_step == 4
    assert cli.datamodule.samples_consumed == 4 * 64
    for step, loss in logged["train/loss"].items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    assert "step 3: replayed with a micro-batch of 32 instead of 64 sequences" in capfd.readouterr().err
    kept = folder / "recovered.ckpt"
    kept.write_bytes((Path(cli.trainer.log_dir) / "checkpoints" / "step-00000004.ckpt").read_bytes())
    assert fit(folder, *rows, recovery, f"--ckpt_path={kept}", steps=5).model.step_state.micro_batch == 32


def test_below_the_smallest_micro_batch_the_error_goes_on(folder, capfd, monkeypatch):
    start = Task._start_micro_batch
    text = "    - class_path: OutOfMemoryRecovery\n      init_args:\n        smallest: 8\n"
    with AllocatorLimit(10**12) as limit:

        def start_without_memory(task, index):
            limit.limit_bytes = 0
            start(task, index)

        monkeypatch.setattr(Task, "_start_micro_batch", start_without_memory)
        with pytest.raises(torch.OutOfMemoryError):
            fit(folder, overlay(folder, text), "--trainer.limit_val_batches=0", steps=2)
    said = capfd.readouterr().err
    assert "Out of memory in step 1" in said
    assert "replayed" not in said  # 8 rows, of which a half would be below the smallest


def test_out_of_memory_while_the_model_is_built_is_reported(folder, capfd):
    with AllocatorLimit(0), pytest.raises(torch.OutOfMemoryError):
        fit(folder, "--trainer.limit_val_batches=0", steps=2)
    assert "Out of memory while the model was being built" in capfd.readouterr().err


TWO_RANKS = """
import sys
import torch
from leanbert.cli import main
from leanbert.tasks.base import Task

start = Task._start_micro_batch

def fail_once(task, index):
    if task.global_step == 1 and task.global_rank == 1 and task.step_state.micro_batch is None:
        raise torch.OutOfMemoryError("little memory on this rank")
    start(task, index)

Task._start_micro_batch = fail_once
main()
"""


@pytest.mark.slow
def test_two_ranks_agree_when_one_runs_out_of_memory(folder, tmp_path):
    """The rank that has enough memory would otherwise wait in the exchange of gradients for ever."""
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)
    (folder / "plain.yaml").write_text(PLAIN)
    recovery = overlay(folder, "    - class_path: OutOfMemoryRecovery\n")
    losses = []
    for program, extra in ((ROOT / "train.py", []), (script, [recovery])):
        arguments = [
            sys.executable, str(program), "fit", "--config=configs/mlm.yaml", f"--config={folder}/plain.yaml", *extra,
            *TINY, f"--data.train_files={folder / 'train.txt'}", f"--data.cache_dir={folder / 'cache'}",
            f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=3", "--trainer.devices=2",
            "--trainer.accelerator=cpu",
        ]  # fmt: skip
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        run = max((tmp_path / "mlm").iterdir())
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        losses.append([event.value for event in events.Scalars("train/loss")])
    assert [event.value for event in events.Scalars(MICRO)] == [2.0]
    assert "replayed with a micro-batch of 2 instead of 4" in done.stderr
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(("step", "rows"), [(0, 2), (1, 2), (2, 4), (3, 4)])
def test_the_micro_batch_is_known_also_where_no_step_is_left(step, rows):
    trainer = SimpleNamespace(global_step=step, max_steps=3, current_epoch=0, loggers=[])
    module = SimpleNamespace(step_state=StepState())
    GradientAccumulation({0: 2, 2: 4}).on_train_start(trainer, module)
    assert module.step_state.wanted_micro_batch == rows
