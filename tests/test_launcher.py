"""What Lightning's first rank does when another one ends, in processes without a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from leanbert import launcher
from leanbert.errors import UserError
from leanbert.launcher import MEETING, ending
from leanbert.ranks import VARIABLES, launched_rank
from tests.distributed.launching import lives

PROGRAM = """
import subprocess, sys, time
from types import SimpleNamespace
import psutil
from leanbert import launcher
launcher.SUMMARY_SECONDS = 0.1
machine = SimpleNamespace(creates_processes_externally=False, validate_settings=lambda **_: None, node_rank=lambda: 1)
ranks = launcher.Launcher(machine, 3, 1)
def start():
    ranks.procs = [subprocess.Popen([sys.executable, "-c", words]) for words in sys.argv[1:]]
    print(*(process.pid for process in ranks.procs), flush=True)
ranks._call_children_scripts = start
ranks.launch(time.sleep, 4)
"""
WAITS = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([WAITS, "import os; os.kill(os.getpid(), 9)"], 1, f"{ending(5, -9)}\n"),
        (["import sys; sys.exit(3)", WAITS], 3, "error: rank 4 has failed with exit code 3, see above.\n"),
        ([WAITS, "import sys; sys.exit(2)"], 2, ""),  # it has said why
        (["pass", "pass"], 0, ""),
    ],
)
def test_a_rank_that_ends_before_its_time_ends_all(words, code, says):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, says)
    assert not any(lives(int(number)) for number in done.stdout.split())


FROZEN = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"


@pytest.mark.parametrize(
    ("function", "code", "says"), [("lambda: 1 / 0", 1, "ZeroDivisionError: division by zero"), ("str", 0, "")]
)
def test_a_frozen_rank_does_not_outlive_the_first(function, code, says):
    program = PROGRAM.replace("time.sleep, 4", function).replace("launcher.SUMMARY", "launcher.signals.ORPHAN")
    done = subprocess.run([sys.executable, "-c", program, FROZEN, WAITS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr[-100:].endswith(f"{says}\n" if says else "")) == (code, True)
    assert not any(lives(int(number)) for number in done.stdout.split())


def test_a_run_that_is_stopped_leaves_the_others_to_end_by_themselves(tmp_path):
    program = PROGRAM.replace("ranks.launch(time.sleep, 4)", "ranks.launch(stop)").replace(
        "def start", "def stop(): raise launcher.Interrupted(15)\ndef start"
    )
    slow = f"import time; time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w')"
    done = subprocess.run([sys.executable, "-c", program, slow], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("Interrupted: SIGTERM\n")
    assert (tmp_path / "saved").exists()


def test_the_line_names_rank_and_signal():
    assert ending(2, 2) is None
    assert ending(7, -signal.SIGSEGV).startswith("error: rank 7 was ended by SIGSEGV. A training goes on")
    assert "SIGKILL (the system does so when its memory is full)" in ending(7, -signal.SIGKILL)


@pytest.fixture
def by_hand(monkeypatch):
    """The second of two machines, whose ranks are started by hand."""
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    monkeypatch.setattr(os, "environ", {**others, **dict(zip(MEETING, ("10.0.0.1", "29500", "1"), strict=True))})
    return monkeypatch


@pytest.mark.parametrize("missing", MEETING)
def test_ranks_of_other_machines_that_nobody_starts_are_not_waited_for(by_hand, missing):
    del os.environ[missing]
    by_hand.setattr("sys.argv", ["train.py", "fit", "--config", "my file.yaml"])
    command = "torchrun --nnodes=2 --node_rank=NUMBER --master_addr=ADDRESS_OF_0 --nproc_per_node=4 train.py fit"
    machine = launcher.Launcher(LightningEnvironment(), 4, 2)
    with pytest.raises(UserError, match=rf"trainer\.num_nodes: 2, .*: {command} --config 'my file\.yaml'$"):
        machine.launch(lambda: None)


def test_those_that_are_started_by_hand_are_waited_for_with_a_line(by_hand, capfd):
    assert launched_rank() == 1  # which leaves locks to the first machine
    machine = launcher.Launcher(LightningEnvironment(), 1, 2)
    assert machine.launch(lambda: "trained") == "trained"
    assert capfd.readouterr().err == "Machine 1 of 2: waits until all have been started, at 10.0.0.1:29500\n"
