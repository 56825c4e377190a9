"""SIGINT and SIGTERM at random moments of every subcommand: message and code, nothing half-written, it goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .forks import PROGRAM, Outcome, Process, command, fresh, kill_group, once
from .kills import Configuration, Reference, difference, nothing_there, reference_of, result_of, run_folder
from .samples import TASKS, command_of, write_samples
from .trained import base_of

SIGNALS = {"SIGINT": 130, "SIGTERM": 143}
SUBCOMMANDS = {
    "fit": (),
    "validate": ("--ckpt_path=last",),
    "test": ("--ckpt_path=last",),
    "predict": ("--ckpt_path=last", "--data.predict_files=train.txt"),
    "prepare": (),
    "plan": ("--json=plan.json", "--budget=8GiB"),
    "export": ("--ckpt_path=last", "--output=exported"),
}
TASKS_OF = {"test": ("classification",), "plan": ("mlm",), "export": ("mlm", "classification", "tagging")}
STARTED_EVERY = 25
"""Signals of which one meets a process that is started as users do, so that it may come during imports."""
START_SECONDS = (0.3, 6.0)
MOST_SECONDS = 60.0
HALF_WRITTEN = re.compile(r"\.tmp|\.partial|\.incomplete")


def experiments(count: int, seed: int) -> list[dict[str, Any]]:
    """Return what is done: each signal and subcommand in turn, a task, and what decides the moment."""
    kinds = [f"{number} {subcommand}" for subcommand in SUBCOMMANDS for number in SIGNALS]
    chance = random.Random(seed)
    found = []
    for number in range(count):
        name, subcommand = kinds[number % len(kinds)].split()
        found.append(
            {
                "kind": f"{name} {subcommand}",
                "task": chance.choice(TASKS_OF.get(subcommand, tuple(TASKS))),
                "started": number // len(kinds) % STARTED_EVERY == 1,
                "chance": chance.randrange(2**32),
            }
        )
    return found


def run(experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Send a signal to a command, look at what it leaves, and repeat the command or go on."""
    name, subcommand = experiment["kind"].split()
    task, chance = experiment["task"], random.Random(experiment["chance"])
    folder = fresh(work / f"signal-{experiment['number']}")
    workers = f"--data.num_workers={chance.choice((0, 2))}"
    if subcommand == "fit":
        write_samples(folder)
        arguments = Configuration(task).fit()
        expected, seconds = _trained(task, work)
    else:
        shutil.copytree(base_of(task, work).folder, folder)
        arguments = _arguments(task, subcommand)
        expected, seconds = once(work / f"said-{task}-{subcommand}.made", lambda: _undisturbed(task, subcommand, work))
    if subcommand == "prepare":
        shutil.rmtree(folder / "cache")
    before = set(_half_written(folder))
    number = getattr(signal, name)
    if experiment["started"]:
        done = started([*arguments, workers], folder, number, chance.uniform(*START_SECONDS))
    else:
        done = interrupted([*arguments, workers], folder, number, chance.uniform(0, seconds))
    wrong = judge(done, SIGNALS[name], set(_half_written(folder)) - before)
    wrong = wrong or again(task, subcommand, arguments, folder, expected)
    if wrong is None:
        shutil.rmtree(folder)
    return {"wrong": wrong, "exit": done.code}


def _arguments(task: str, subcommand: str) -> list[str]:
    more = ["--data.test_files=train.csv"] if subcommand == "test" else []
    return command_of(task, subcommand, *SUBCOMMANDS[subcommand], *more)


def _trained(task: str, work: Path) -> tuple[Any, float]:
    reference = reference_of(Configuration(task), work)
    assert isinstance(reference, Reference), reference
    return reference.result, reference.seconds


def _undisturbed(task: str, subcommand: str, work: Path) -> tuple[str, float]:
    """Return what the command prints, and how long it takes."""
    folder = fresh(work / f"undisturbed-{task}-{subcommand}")
    shutil.copytree(base_of(task, work).folder, folder)
    done = Process(command(_arguments(task, subcommand)), folder).wait()
    assert done.code == 0, done.stderr
    return done.stdout, done.seconds


def interrupted(arguments: list[str], folder: Path, number: int, seconds: float) -> Outcome:
    """Return how a forked command ended that got a signal some seconds after its main function began."""
    begun = folder / "begun"
    process = Process(command(arguments, begun.touch), folder)
    while not begun.exists():
        time.sleep(0.001)
    time.sleep(seconds)
    _send(process.pid, number)
    return process.wait(MOST_SECONDS)


def started(arguments: list[str], folder: Path, number: int, seconds: float) -> Outcome:
    """Return how `python train.py` ended that got a signal some seconds after its start."""
    words = [sys.executable, str(PROGRAM), *arguments]
    begin = time.monotonic()
    with subprocess.Popen(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        time.sleep(seconds)
        _send(process.pid, number)
        try:
            out, err = process.communicate(timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            kill_group(process.pid)
            out, err = process.communicate()
    return Outcome(process.returncode, out, err, time.monotonic() - begin, 0.0, 0)


def _send(process: int, number: int) -> None:
    """Send the signal, SIGINT to the whole group, as a terminal does."""
    try:
        (os.killpg if number == signal.SIGINT else os.kill)(process, number)
    except ProcessLookupError:
        return


def judge(done: Outcome, code: int, half_written: set[str]) -> str | None:
    """Return what is against the promise to those who interrupt."""
    said = done.stderr[-300:]
    if "Traceback" in done.stderr or "Error:" in done.stderr.replace("error: ", ""):
        return f"traceback: {said}"
    if done.code not in (0, code):
        return f"exit code {done.code}: {said}"
    if done.code == code and "topped by" not in done.stderr:
        return f"no message: {said!r}"
    return f"half-written: {sorted(half_written)[:3]}" if half_written else None


def again(task: str, subcommand: str, arguments: list[str], folder: Path, expected: Any) -> str | None:
    """Return in what the command differs, done again after the interruption, from an undisturbed one."""
    if subcommand == "plan":  # takes too long to be done again; its file is whole or not there
        plan = folder / "plan.json"
        return None if not plan.exists() or json.loads(plan.read_text()) else "an empty plan"
    if subcommand != "fit":
        done = Process(command(arguments), folder).wait()
        return done.problem or (None if done.stdout == expected else f"then {done.stdout[:200]} for {expected[:200]}")
    done = Process(command([*arguments, "--ckpt_path=last"]), folder).wait()
    if nothing_there(done):
        done = Process(command(arguments), folder).wait()
    result = result_of(run_folder(Configuration(task), folder))
    return done.problem or difference(_at_the_end(expected), _at_the_end(result))


def _at_the_end(result: dict[str, Any]) -> dict[str, Any]:
    """Return a run's result without the earlier checkpoints, of which a signal adds one and so takes another away."""
    last = result["summary"]["checkpoint"]

    def stays(name: str) -> bool:
        return not Path(name).name.startswith("step-") or Path(name).name == last

    kept = {name: value for name, value in result.items() if stays(name)}
    return {**kept, "files": {name: True for name in result["files"] if stays(name)}}


def _half_written(folder: Path) -> Iterator[str]:
    return (str(path) for path in folder.rglob("*") if HALF_WRITTEN.search(path.name))
