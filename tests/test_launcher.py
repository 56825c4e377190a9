"""What Lightning's first rank does when another one ends, in processes without a model."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from leanbert.launcher import ending
from tests.distributed.launching import lives

PROGRAM = """
import subprocess, sys, time
from types import SimpleNamespace
import psutil
from leanbert import launcher
launcher.SUMMARY_SECONDS = 0.1
machine = SimpleNamespace(creates_processes_externally=False, validate_settings=lambda **_: None, node_rank=lambda: 1)
ranks = launcher.Launcher(machine, 3, 2)
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


def test_the_line_names_rank_and_signal():
    assert ending(2, 2) is None
    assert ending(7, -signal.SIGSEGV).startswith("error: rank 7 was ended by SIGSEGV. A training goes on")
    assert "SIGKILL (the system does so when its memory is full)" in ending(7, -signal.SIGKILL)
