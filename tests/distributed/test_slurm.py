"""The script of docs/distributed.md, in a shell whose `srun` starts two tasks on this machine, as SLURM does."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.program import ROOT
from tests.corpus import write_corpus
from tests.distributed.launching import FIT, PROGRAM, TIMEOUT_SECONDS, errors
from tests.training import read_scalars

pytestmark = pytest.mark.slow

SRUN = f"""#!{sys.executable}
import os, subprocess, sys
assert sys.argv[1:3] == ["--kill-on-bad-exit=0", "--wait=600"]
own = {{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}}
tasks = [
    subprocess.Popen(sys.argv[3:], env={{**os.environ, **own, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(2)
]
with open("tasks", "w") as file:
    print(*(task.pid for task in tasks), file=file)
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = "#!/bin/sh\necho $* > requeued\n"
STEPS = 60


def script(folder, *more):
    """Return the script, for a tiny model."""
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```sbatch\n(.*?)```", page, flags=re.DOTALL)
    tiny = shlex.join([*FIT[2:], f"--trainer.max_steps={STEPS}", "--checkpoint.every_n_minutes=null", *more])
    path = folder / "train.sbatch"
    path.write_text(re.sub(r"python train\.py (.*)", rf"{sys.executable} {PROGRAM} \1 {tiny}", text))
    return path


def start(folder, path):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "mlm", "SLURM_NODELIST": "127.0.0.1", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }  # fmt: skip
    said = (folder / "said").open("a")
    return subprocess.Popen(["bash", str(path)], cwd=folder, env=environment, stdout=said, stderr=said)


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "train.txt")
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def test_a_job_that_is_told_to_end_saves_goes_into_the_queue_and_goes_on(folder):
    undisturbed = script(folder, "--trainer.default_root_dir=whole")
    assert start(folder, undisturbed).wait(TIMEOUT_SECONDS) == 0
    assert not (folder / "requeued").exists()
    path = script(folder)
    job = start(folder, path)
    events = folder / "runs" / "mlm" / "version_0"
    deadline = time.time() + TIMEOUT_SECONDS
    while not list(events.glob("events*")) or 3 not in read_scalars(events).get("train/loss", {}):
        assert time.time() < deadline, (folder / "said").read_text()
        time.sleep(0.1)
    for number in (folder / "tasks").read_text().split():
        os.kill(int(number), signal.SIGTERM)
    assert job.wait(TIMEOUT_SECONDS) == 143
    assert (folder / "requeued").read_text() == "requeue 4711\n"
    said = (folder / "said").read_text()
    assert said.count("Stopped by SIGTERM and saved") == 1
    assert errors(said) == []
    (folder / "requeued").unlink()
    assert start(folder, path).wait(TIMEOUT_SECONDS) == 0
    assert not (folder / "requeued").exists()
    assert [run.name for run in (folder / "runs" / "mlm").iterdir()] == ["version_0"]
    assert read_scalars(events)["train/loss"] == read_scalars(folder / "whole" / "mlm" / "version_0")["train/loss"]


def test_tasks_that_contradict_the_settings(folder):
    path = script(folder, "--trainer.devices=4")
    assert start(folder, path).wait(TIMEOUT_SECONDS) == 2
    says = "trainer.devices: 4, but srun has started ranks for 2. Leave it out, or give srun --ntasks-per-node=4."
    assert errors((folder / "said").read_text()) == [f"error: {says}", f"error: rank 1: {says}"]
    assert not (folder / "requeued").exists()
