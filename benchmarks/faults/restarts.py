"""Kills under torchrun, which starts all ranks again: the run ends by itself as one that nobody disturbed.

As a program, `torchrun ... -m faults.restarts fit ...`, it is `train.py` with the faults of `FAULTS` in it.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil

from .forks import ROOT, TIMEOUT_SECONDS, fresh, once
from .kills import at_operation, die, difference, result_of, watch
from .samples import TRAINING, command_of, write_samples

FAULTS = "LEANBERT_FAULTS"
"""Environment variable: JSON with a fault for each start by torchrun, in order."""
KINDS = ("time", "checkpoint", "operation")
STRATEGIES = {
    "ddp": "ddp",
    "fsdp": "fsdp",
    "shards": '{"class_path": "FullySharded", "init_args": {"checkpoints": "sharded"}}',
}
RANKS = 2
KILLS = 3
"""In each experiment, one for each of the first starts."""
LOG2_BYTES = (10, 17)
"""A checkpoint breaks off after as many bytes; it has 2 ** 19, a shard 2 ** 17.5."""
CHECKPOINTS = 5
OPERATIONS = 60
SHARDS = 4
"""That a rank other than the first writes, which does nothing else to files."""


def experiments(count: int, seed: int) -> list[dict[str, Any]]:
    """Return what is done: a strategy, and the faults of each start."""
    chance = random.Random(seed)
    return [
        {
            "kind": strategy,
            "faults": [drawn(KINDS[(number + start) % len(KINDS)], strategy, chance) for start in range(KILLS)],
        }
        for number, strategy in zip(range(count), cycle(STRATEGIES), strict=False)
    ]


def drawn(kind: str, strategy: str, chance: random.Random) -> dict[str, Any]:
    """Return a fault: which rank it meets, and when."""
    rank = chance.randrange(RANKS) if kind == "time" or strategy == "shards" else 0  # which writes
    return {
        "kind": kind,
        "rank": rank,
        "share": chance.uniform(0, 0.8),  # of the time that an undisturbed run takes
        "checkpoint": chance.randrange(SHARDS if rank else CHECKPOINTS),
        "bytes": int(2 ** chance.uniform(*LOG2_BYTES)),
        "operation": chance.randrange(SHARDS if rank else OPERATIONS),
    }


def run(experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return how many kills there were, and in what the run differs from the undisturbed one, if in anything."""
    strategy = experiment["kind"]
    name = f"undisturbed-{strategy}"
    reference, seconds = once(work / f"{name}.made", lambda: trained(strategy, [], work / name))
    faults = [{**fault, "seconds": fault["share"] * seconds} for fault in experiment["faults"]]
    folder = work / f"restart-{experiment['number']}"
    found, _ = trained(strategy, faults, folder)
    kills = len(list(folder.glob("killed-*")))
    wrong = next((each for each in (reference, found) if isinstance(each, str)), None) or difference(reference, found)
    if wrong is None:
        shutil.rmtree(folder)
    return {"kills": kills, "wrong": wrong}


def trained(strategy: str, faults: list[dict[str, Any]], folder: Path) -> tuple[dict[str, Any] | str, float]:
    """Train under torchrun, with a fault in each of the first starts.

    Return what the run leaves, or what went wrong, and the seconds that it took.
    """
    write_samples(fresh(folder))
    launch = ["--standalone", f"--nproc_per_node={RANKS}", f"--max-restarts={len(faults)}", "-m", __spec__.name]
    fit = command_of("mlm", "fit", *TRAINING, f"--trainer.strategy={STRATEGIES[strategy]}", "--ckpt_path=auto")
    environment = {
        **os.environ, FAULTS: json.dumps(faults), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *fit]
    began = time.monotonic()
    with (folder / "said").open("wb") as said:
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            code = process.wait(TIMEOUT_SECONDS)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            code = "no end"
            for each in [*process.children(recursive=True), process]:
                each.kill()
    seconds = time.monotonic() - began
    runs = list((folder / "runs" / "mlm").glob("version_*"))
    if code != 0 or len(runs) != 1:
        return f"{code}, {len(runs)} runs: {(folder / 'said').read_text(errors='replace')[-600:]}", seconds
    return result_of(runs[0]), seconds


# ---- in a rank


def arm(fault: dict[str, Any], start: int) -> None:
    """Let a fault end this process, and leave a file that says so."""

    def end() -> None:
        Path(f"killed-{start}").touch()
        die()

    def break_off(event: str, path: str) -> None:
        nonlocal checkpoints
        if event == "open" and "/checkpoints/" in path:
            if checkpoints == 0:
                Path(f"killed-{start}").touch()
                resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
            checkpoints -= 1

    checkpoints = fault["checkpoint"]
    if fault["kind"] == "checkpoint":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        watch(break_off)
    elif fault["kind"] == "operation":
        at_operation(fault["operation"], end)
    else:
        timer = threading.Timer(fault["seconds"], end)
        timer.daemon = True
        timer.start()


def main() -> None:
    """Train as `train.py` does, with the fault of this start if it is this rank's."""
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for number, fault in enumerate(json.loads(os.environ[FAULTS])):
        if number == start and fault["rank"] == int(os.environ["RANK"]):
            arm(fault, start)
    from leanbert.cli import main as train
    from leanbert.distributed.strategy import FullySharded

    FullySharded._may_copy = lambda *_: True  # type: ignore[method-assign]  # in the background on a CPU too
    train()


if __name__ == "__main__":
    main()
