"""Experiments of kill -9: a run that is killed and resumed until it ends, compared with one that nobody disturbed."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leanbert.checkpoints import load

from .forks import TIMEOUT_SECONDS, Outcome, Process, command, fresh, kill_group, once
from .samples import STEPS, TASKS, TRAINING, command_of, write_samples

KINDS = ("time", "operation", "write", "end", "preparation")
DISTRIBUTED_EVERY = 100
"""Experiments of which one runs on two processes: the second one is started anew each time, for seconds."""
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS_AT_END = 12
LOG2_BYTES = (10, 20)
"""Writing breaks off after as many bytes; a checkpoint has 2 ** 19."""
NEED_ACCELERATOR = {"offload_host"}
TRIES = 3
MOST_COMMANDS = 12
TIME_DEPENDENT = ("seconds", "per_second", "rss", "peak_bytes", "by_phase", "by_category")
LAST = f"step-{STEPS:08d}.ckpt"


@dataclass(frozen=True)
class Configuration:
    """What is trained."""

    task: str
    overlay: str | None = None
    workers: int = 0
    average: bool = False
    processes: int = 1

    @property
    def name(self) -> str:
        """A folder's name that tells it from others."""
        return "-".join(str(value) for value in asdict(self).values())

    def fit(self) -> list[str]:
        """Return the arguments of the command that trains it."""
        more = [*TRAINING, f"--data.num_workers={self.workers}"]
        if self.average:
            more.append("--checkpoint.average_last=2")
        if self.processes > 1:
            more += [f"--trainer.devices={self.processes}", "--trainer.strategy=ddp"]
        return command_of(self.task, "fit", *more, overlays=[self.overlay] if self.overlay else [])


@dataclass
class Reference:
    """An undisturbed run: its files, how long it took, and its file operations."""

    result: dict[str, Any]
    seconds: float
    operations: list[str] = field(default_factory=list)

    @property
    def prepared(self) -> int:
        """Operations before those in the run's folder."""
        return next((n for n, what in enumerate(self.operations) if "/runs/" in what), len(self.operations))


def configurations(overlays: list[str]) -> list[Configuration]:
    """Return every task plain, with workers and with an average; every technique with two tasks."""
    tasks = list(TASKS)
    plain = [
        Configuration(task, None, workers, average) for task in tasks for workers in (0, 2) for average in (False, True)
    ]
    second = [task for task in tasks if task != "mlm"]
    return plain + [
        Configuration(task, overlay, 2 * (number % 2), number % 3 == 0)
        for number, overlay in enumerate(overlays)
        for task in ("mlm", second[number % len(second)])
    ]


def experiments(count: int, seed: int) -> list[dict[str, Any]]:
    """Return what is done: a configuration, kinds of kills, and what decides their moments."""
    found = {path.stem for path in Path(TASKS["mlm"].config).parent.glob("memory/*.yaml")}
    overlays = sorted(found - NEED_ACCELERATOR)
    chance = random.Random(seed)
    choice = configurations(overlays)
    chance.shuffle(choice)
    found = []
    for number in range(count):
        chosen = choice[number % len(choice)]
        if number % DISTRIBUTED_EVERY == DISTRIBUTED_EVERY // 2:
            chosen = Configuration(("mlm", "classification")[number // DISTRIBUTED_EVERY % 2], processes=2)
        kind = KINDS[number % len(KINDS)]
        found.append({"kind": kind, "configuration": asdict(chosen), "chance": chance.randrange(2**32)})
    return found


def run(experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Kill, resume, compare; return what was wrong, if anything, and how often it was killed."""
    configuration = Configuration(**experiment["configuration"])
    reference = reference_of(configuration, work)
    if isinstance(reference, str):
        return {"skipped": reference}
    for attempt in range(TRIES):
        chance = random.Random(experiment["chance"] + attempt)
        folder = write_samples(fresh(work / f"kill-{experiment['number']}-{attempt}"))
        kills, wrong = disturbed(configuration, reference, experiment["kind"], chance, folder)
        if wrong is None:
            shutil.rmtree(folder)
        if wrong is not None or kills >= 2:
            break
    return {"kills": kills, "wrong": wrong}


def disturbed(
    configuration: Configuration, reference: Reference, kind: str, chance: random.Random, folder: Path
) -> tuple[int, str | None]:
    """Return how often the run was killed, and in what it differs from the undisturbed one."""
    wanted, kills = chance.randint(2, 5), 0
    resume: list[str] = []
    groups = []
    try:
        for _ in range(MOST_COMMANDS):
            fault = draw(kind if kills < wanted else "", chance, reference, first=kills == 0)
            process = Process(command([*configuration.fit(), *resume], fault.before), folder)
            groups.append(process.pid)
            done = process.wait(fault.seconds, orphans=True)  # the next command begins beside what a kill left
            if done.code == 0:
                return kills, difference(reference.result, result_of(run_folder(configuration, folder)))
            if done.seconds < TIMEOUT_SECONDS and done.code in (-signal.SIGKILL, -signal.SIGXFSZ):
                kills += 1
                resume = ["--ckpt_path=last"]
            elif resume and nothing_there(done):
                resume = []  # as it says
            else:
                return kills, f"after kill {kills}: {done.problem or done.stderr[-300:]}"
        return kills, f"no end after {MOST_COMMANDS} commands"
    finally:
        for group in groups:
            kill_group(group)


def nothing_there(done: Outcome) -> bool:
    """Return whether a resuming command said that there is nothing to go on from."""
    return done.code == 2 and any(words in done.stderr for words in ("no run below", "no usable checkpoint"))


# ---- the moments of kills


@dataclass(frozen=True)
class Fault:
    """What arms a kill in the process, and after how many seconds it comes from outside."""

    before: Callable[[], object] | None = None
    seconds: float = TIMEOUT_SECONDS


def draw(kind: str, chance: random.Random, reference: Reference, first: bool) -> Fault:
    """Return a kill of a kind at a random moment of the run; of no kind: none."""
    number = chance.randrange(len(reference.operations))
    most = int(2 ** chance.uniform(*LOG2_BYTES))
    early, late = number % max(1, reference.prepared), number % OPERATIONS_AT_END
    faults = {
        "": Fault(),
        "operation": Fault(lambda: at_operation(number, die)),
        "write": Fault(lambda: in_write(number, most)),
        "end": Fault(lambda: at_operation(late, die, after=LAST)),
    }
    if kind == "preparation" and first:
        return Fault(lambda: at_operation(early, die))
    return faults.get(kind) or Fault(seconds=chance.uniform(0, reference.seconds))


def watch(seen: Callable[[str, str], object]) -> None:
    """Tell `seen` of each change to files below the current folder by this process, before it is done."""
    own, here = os.getpid(), os.getcwd()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or os.getpid() != own:
            return
        path = arguments[1 if event in ("os.rename", "os.link") else 0]
        if not isinstance(path, str | bytes | os.PathLike) or (event == "open" and not arguments[2] & WRITES):
            return
        path = os.path.abspath(os.fsdecode(path))
        if path.startswith(here):
            seen(event, path)

    sys.addaudithook(hook)


def at_operation(number: int, act: Callable[[], object], after: str | None = None) -> None:
    """Act before the file operation of a number, counted from the start or from the renaming to a file's name."""
    counted = 0
    counting = after is None or any(Path.cwd().rglob(after))

    def seen(event: str, path: str) -> None:
        nonlocal counted, counting
        if counting:
            counted += 1
            if counted == number + 1:
                act()
        elif event == "os.rename" and path.endswith(f"/{after}"):
            counting = True

    watch(seen)


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_write(number: int, most: int) -> None:
    """From a file operation on, let a write beyond `most` bytes of a file end this process, as hard as a kill."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    at_operation(number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))


# ---- what came out


def reference_of(configuration: Configuration, work: Path) -> Reference | str:
    """Return the undisturbed run, made once; or why there is none."""
    folder = work / f"reference-{configuration.name}"
    return once(folder.with_suffix(".made"), lambda: undisturbed(configuration, folder))


def undisturbed(configuration: Configuration, folder: Path) -> Reference | str:
    """Train without a fault, twice: both must be equal, or nothing can be compared."""
    log = folder / "operations"

    def note() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(lambda event, path: os.write(file, f"{event} {path}\n".encode()))

    done = Process(command(configuration.fit(), note), write_samples(fresh(folder))).wait()
    if done.code:
        return done.stderr.strip().splitlines()[-1][:200]
    reference = Reference(result_of(run_folder(configuration, folder)), done.seconds, log.read_text().splitlines())
    again = Process(command(configuration.fit()), write_samples(fresh(folder))).wait()
    other = difference(reference.result, result_of(run_folder(configuration, folder)))
    return reference if again.code == 0 and other is None else f"two undisturbed runs differ: {other}"


def run_folder(configuration: Configuration, folder: Path) -> Path:
    """Return the run run."""
    runs = (folder / "runs" / TASKS[configuration.task].runs).glob("version_*")
    return max(runs, key=lambda run: int(run.name.removeprefix("version_")))


def result_of(run: Path) -> dict[str, Any]:
    """Return all that a run leaves: logged values, checkpoints, summary and the names of its files."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of what is logged a second time
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(("train/", "val/", "average/"))]
    logged = {
        tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags if not time_dependent(tag)
    }
    names = {str(path.relative_to(run)): True for path in run.rglob("*") if "tfevents" not in path.name}
    checkpoints = {path.name: essence(load(path)) for path in run.glob("checkpoints/*.ckpt")}
    summary = json.loads(path.read_text()) if (path := run / "summary.json").exists() else {}
    summary = {key: value for key, value in summary.items() if not time_dependent(key)}
    summary["checkpoint"] = Path(summary.get("checkpoint", "")).name
    return {"files": names, "logged": logged, "summary": summary, **checkpoints}


def essence(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what training has made of a checkpoint."""
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    return {part: checkpoint[part] for part in parts if part in checkpoint}


def time_dependent(name: str) -> bool:
    """Return whether a value of this name is measured, not computed."""
    return any(part in name for part in TIME_DEPENDENT)


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Return where two results differ first, None: nowhere. Tensors are compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{place}: {sorted(map(str, one.keys() ^ other.keys()))[:5]} on one side only"
        return next(filter(None, (difference(one[key], other[key], f"{place}/{key}") for key in one)), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return difference(dict(enumerate(one)), dict(enumerate(other)), place)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return None if one.dtype == other.dtype and torch.equal(one, other) else f"{place}: other tensors"
    equal = one == other or (one != one and other != other)
    return None if equal else f"{place}: {str(one)[:80]} and {str(other)[:80]}"
