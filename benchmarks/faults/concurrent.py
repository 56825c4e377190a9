"""Two processes at the same moment: every outcome is that of either alone, or one is refused with the reason."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from pathlib import Path
from typing import Any

from .forks import Outcome, Process, command, fresh, once
from .kills import Configuration, Reference, difference, reference_of, result_of, run_folder
from .samples import STEPS, TASKS, command_of, write_samples

PAIRS = ("fit+fit", "resume+resume", "prepare+prepare", "predict+predict", "fit+prepare")
APART_SECONDS = 0.1
HALF = STEPS // 2


def experiments(count: int, seed: int) -> list[dict[str, Any]]:
    """Return what is done: each pair with a cold and a warm cache in turn."""
    kinds = [f"{pair} {cache}" for pair in PAIRS for cache in ("cold", "warm")]
    chance = random.Random(seed)
    return [
        {"kind": kinds[number % len(kinds)], "task": chance.choice(list(TASKS)), "chance": chance.randrange(2**32)}
        for number in range(count)
    ]


def run(experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Start two processes, and compare what they leave with what one alone does."""
    pair, cache = experiment["kind"].split()
    task, chance = experiment["task"], random.Random(experiment["chance"])
    alone = once(work / f"alone-{task}.made", lambda: Alone(task, work))
    folder = fresh(work / f"pair-{experiment['number']}")
    shutil.copytree(work / f"alone-{task}", folder)
    if not pair.startswith(("resume", "predict")):
        shutil.rmtree(folder / "runs")
    if cache == "cold":
        shutil.rmtree(folder / "cache")
    words = [_arguments(task, name) for name in pair.split("+")]
    processes = []
    for arguments in words:
        processes.append(Process(command(arguments), folder))
        time.sleep(chance.uniform(0, APART_SECONDS))
    done = [process.wait() for process in processes]
    wrong = judge(task, pair, done, folder, alone)
    if wrong is None:
        shutil.rmtree(folder)
    return {"wrong": wrong, "codes": [outcome.code for outcome in done]}


def _arguments(task: str, name: str) -> list[str]:
    training = Configuration(task).fit()
    if name == "resume":
        return [*training, "--ckpt_path=last"]
    if name == "predict":
        return command_of(task, "predict", "--ckpt_path=last", f"--data.predict_files={task}.lines")
    return training if name == "fit" else command_of(task, name)


class Alone:
    """What one process does: a run, a run that goes on from its half, answers, a cache."""

    def __init__(self, task: str, work: Path) -> None:
        folder = write_samples(fresh(work / f"alone-{task}"))
        reference = reference_of(Configuration(task), work)
        assert isinstance(reference, Reference), reference
        self.trained = reference.result
        _do([*_arguments(task, "fit"), f"--trainer.max_steps={HALF}"], folder)
        self.cache = cache_digests(folder)
        self.answers = _do(_arguments(task, "predict"), folder).stdout
        copy = fresh(work / f"resumed-{task}")
        shutil.copytree(folder, copy)
        _do(_arguments(task, "resume"), copy)
        self.resumed = result_of(run_folder(Configuration(task), copy))


def _do(arguments: list[str], folder: Path) -> Outcome:
    done = Process(command(arguments), folder).wait()
    assert done.code == 0, done.stderr
    return done


def cache_digests(folder: Path) -> dict[str, str]:
    """Return digests of the files of a cache by name, without locks and the list that has the files' times."""
    files = (path for path in (folder / "cache").rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest()
        for path in files
        if path.suffix != ".lock" and path.name != "digests.json"
    }


def judge(task: str, pair: str, done: list[Outcome], folder: Path, alone: Alone) -> str | None:
    """Return what is not as it is with one process alone."""
    runs = sorted((folder / "runs" / TASKS[task].runs).glob("version_*"))
    codes = sorted(outcome.code for outcome in done)
    if problem := next((outcome.problem for outcome in done if outcome.problem), None):
        return problem
    if pair == "resume+resume":
        said = "".join(outcome.stderr for outcome in done)
        if codes != [0, 2] and "Finished" not in said:
            return f"exit codes {codes}, one was to be refused"
        return difference([alone.resumed], [result_of(run) for run in runs])
    if codes != [0, 0]:
        return f"exit codes {codes}: {[outcome.stderr[-200:] for outcome in done]}"
    if pair == "predict+predict":
        return difference([alone.answers] * 2, [outcome.stdout for outcome in done])
    count = pair.split("+").count("fit")
    return difference([alone.trained] * count, [result_of(run) for run in runs]) or difference(
        alone.cache, cache_digests(folder)
    )
