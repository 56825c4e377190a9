"""Subcommands of `train.py`, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def train_py(subcommand: str, config: str, *arguments: str, log: Path, one_thread: bool) -> str:
    """Run a subcommand with `configs/CONFIG.yaml`, add its messages to the file `log`, and return what it printed."""
    words = [sys.executable, "train.py", subcommand, f"--config=configs/{config}.yaml", *arguments]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    with open(log, "a") as messages:
        done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=messages)
    if done.returncode:
        raise SystemExit(f"{subcommand} failed, see {log}")
    return done.stdout.decode()
