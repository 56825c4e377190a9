"""`train.py` on several ranks, started by Lightning or by torchrun, on one machine or on two that are this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from tests.cli.program import ROOT
from tests.distributed.ranks import free_port
from tests.training import TINY

PROGRAM = str(ROOT / "train.py")
FIT = [
    "fit", "--config=configs/mlm.yaml", *TINY, "--data.train_files=train.txt", "--model.optimizer.name=adamw",
    "--model.optimizer.lr=1e-3", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.val_check_interval=10",
]  # fmt: skip
TIMEOUT_SECONDS = 120


def started(folder: Path, *commands: list[str], **variables: str) -> list[tuple[int, str]]:
    """Run commands at the same time; return exit code and words of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables}
    processes = [
        subprocess.Popen(
            command, cwd=folder, env=environment, text=True, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for command in commands
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:  # its ranks end with it
                process.kill()
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


def lightning(*arguments: str, ranks: int) -> list[str]:
    """Return the command by which Lightning starts the ranks."""
    return [sys.executable, PROGRAM, *FIT, f"--trainer.devices={ranks}", *arguments]


def torchrun(*arguments: str, ranks: int, options: tuple[str, ...] = ("--standalone",)) -> list[str]:
    """Return the command by which torchrun starts ranks on this machine."""
    return [
        sys.executable, "-m", "torch.distributed.run", *options, f"--nproc_per_node={ranks}", PROGRAM, *FIT, *arguments
    ]  # fmt: skip


def two_machines() -> list[tuple[str, ...]]:
    """Return the options of torchrun on each of two machines."""
    place = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    return [(*place, f"--node_rank={number}") for number in (0, 1)]


def machines_that_may_go() -> list[tuple[str, ...]]:
    """Return the options of torchrun on each of two machines, of which the first goes on alone if it must."""
    place = ("--nnodes=1:2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=run")
    return [
        (*place, "--max-restarts=2", "--local_addr=127.0.0.1", f"--rdzv_conf=is_host={host},last_call_timeout=10")
        for host in ("true", "false")
    ]


def lives(number: int) -> bool:
    """Return whether a process is there, and has not ended: whoever ends it may leave it to others to notice."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def errors(words: str) -> list[str]:
    """Return the lines of errors of ours."""
    return [line for line in words.splitlines() if line.startswith("error: ")]
