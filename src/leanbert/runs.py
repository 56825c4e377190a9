"""Run folders, `<root>/<task>/version_N`: who makes and trains them, and which checkpoint a name means."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from leanbert import checkpoints
from leanbert.checkpoints import AVERAGE, BEST, TRAINING_STATE
from leanbert.errors import UserError
from leanbert.files import DISK_FULL, expand, remove_leftovers
from leanbert.messages import say

NAMES = ("last", "best", "average", "auto")
"""What `--ckpt_path` may be besides a file."""


class Found(NamedTuple):
    """A checkpoint: where it is, and what `checkpoints.read` has found in it."""

    path: Path
    checkpoint: dict[str, Any]


class MissingCheckpointError(UserError):
    """A run has no checkpoint such as is asked for."""


class Run:
    """A run's folder. What it holds is known by looking, so that it may be moved; its lock ends with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._lock: FileLock | None = None

    def lock(self) -> None:
        """Keep other processes from training this run, and remove what a killed one left half-written.

        Raises:
            UserError: Another process trains it, or the folder cannot be written.
        """
        if not self.try_lock():
            raise UserError(
                f"{self.folder}: another process is training this run. Wait for its end, or leave --ckpt_path out "
                "to start a new one."
            )

    def try_lock(self) -> bool:
        """Lock as `lock` does, unless another process has; return whether it is done."""
        lock = FileLock(self.folder / ".lock")
        with _explained(self.folder):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                return False
        self._lock = lock
        for folder in (self.folder, self.checkpoints, self.checkpoints / "weights", self.folder / "tokenizer"):
            remove_leftovers(folder)
        return True

    def release(self) -> None:
        """Let other processes train this run."""
        if self._lock is not None:
            self._lock.release()

    def discard(self) -> None:
        """Remove the folder of a run that was refused before it trained."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def candidates(self) -> list[Path]:
        """Return the checkpoints that training can go on from, whole or not, by their steps, the newest first."""
        steps = {
            path: int(match[1])
            for path in self.checkpoints.glob("step-*.ckpt")
            if (match := re.fullmatch(r"step-([0-9]+)\.ckpt", path.name))
        }
        best = self.checkpoints / BEST
        if best.exists():
            step = checkpoints.step_of(best)
            steps[best] = -1 if step is None else step
        return sorted(steps, key=lambda path: (steps[path], path != best), reverse=True)

    def find(self, which: str, *, hold: bool = False, first: bool | None = None) -> Found:
        """Return the checkpoint that `which` of `NAMES` means, and say which that is, and what was passed over.

        `last` and `auto` are the newest that is whole and that training can go on from.

        Args:
            which: One of `NAMES`.
            hold: Keep it where it is, though another process trains the run and deletes its older ones.
            first: Whether this is the first of the ranks that train, which alone looks for changed bytes in shards: it
                puts such a folder aside, for the others take it for whole. None: nothing is trained.

        Raises:
            MissingCheckpointError: There is none.
            UserError: It is damaged, and is not `last`.
        """
        if which not in ("last", "auto"):
            return self._find_named(which)
        damaged: list[Path] = []
        for path in self.candidates():
            if hold and not checkpoints.hold(path):
                return self.find(which, hold=True, first=first)  # it has gone since it was listed
            try:
                checkpoint = checkpoints.read(path, all_sums=first is not False)
            except UserError:
                checkpoint = {}
            if checkpoint.keys() >= set(TRAINING_STATE):
                over = f"; passed over, damaged: {', '.join(each.name for each in damaged)}" if damaged else ""
                for folder in damaged if first else ():
                    if folder.is_dir():
                        checkpoints.put_aside(folder)
                say(f"last: {path}, step {checkpoint['global_step']:,}{over}")
                return Found(path, checkpoint)
            damaged.append(path)
        if damaged:
            names = ", ".join(path.name for path in damaged)
            raise MissingCheckpointError(f"no usable checkpoint in {self.checkpoints} (damaged: {names}). Give a file")
        raise MissingCheckpointError(f"{self.folder}, the newest run, has no checkpoint yet. Give a file")

    def _find_named(self, which: str) -> Found:
        path = self.checkpoints / {"best": BEST, "average": AVERAGE}[which]
        if not path.is_file():
            reason = (
                "The run has not validated yet"
                if which == "best"
                else "It is written at the end of a run with checkpoint.average_last or average_best"
            )
            raise MissingCheckpointError(f"no {path}. {reason}: use last, or give a file")
        found = Found(path, checkpoints.read(path))
        say(f"{which}: {path}, step {found.checkpoint['global_step']:,}")
        return found

    def finished_at(self, step: int) -> bool:
        """Return whether the summary says that this run has finished, at `step` or later."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            return bool(summary["status"] == "finished" and summary["steps"] >= step)
        except (OSError, ValueError, KeyError, TypeError):
            return False


class TaskRuns:
    """The runs of a task below a root folder; no other code makes, numbers or looks for them.

    Args:
        root: `trainer.default_root_dir`.
        task: Name of the task.

    Raises:
        UserError: The root is no name of a folder.

    """

    def __init__(self, root: str, task: str) -> None:
        self.folder = expand(root, "trainer.default_root_dir") / task

    def all(self) -> list[Run]:
        """Return the runs, the newest last."""
        with _explained(self.folder):
            names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        numbers = {int(match[1]): name for name in names if (match := re.fullmatch(r"version_([0-9]+)", name))}
        return [Run(self.folder / numbers[number]) for number in sorted(numbers)]

    def create(self) -> Run:
        """Make the next run's folder, which no other process has, and lock it.

        Raises:
            UserError: It cannot be written.
        """
        number = 1 + max((int(run.folder.name.removeprefix("version_")) for run in self.all()), default=-1)
        with _explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            run = Run(self.folder / f"version_{number}")
            number += 1
            try:
                with _explained(self.folder):
                    run.folder.mkdir()
            except FileExistsError:
                continue
            if run.try_lock():  # unless another process, told to go on, was faster
                return run

    def owner(self, path: Path) -> Run | None:
        """Return the run that the checkpoint at `path` lies in, if it is one of these."""
        folder = path.resolve().parent.parent
        here = folder.parent == self.folder.resolve() and re.fullmatch(r"version_[0-9]+", folder.name)
        return Run(self.folder / folder.name) if here else None

    def find(self, which: str) -> Found:
        """Return the checkpoint that `last`, `best` or `average` means, of the newest run, and say which that is.

        `last` is the newest file that is whole; `auto` is `last`.

        Raises:
            UserError: There is no run, or the newest has no such checkpoint: an older one never stands in for it.
        """
        return self._find(which, self.all(), hold=True)

    def find_to_train(self, which: str, *, lock: bool) -> tuple[Run | None, Found | None]:
        """Return the run that training goes on in, locked if asked to, and its checkpoint that `which` means.

        Without a checkpoint the run was stopped before its first, and is started again. Without a run there was none,
        for `auto`.

        Raises:
            UserError: As `find`, or the run has damaged checkpoints only, or is being trained.
        """
        runs = self.all()
        if not runs:
            return None, None if which == "auto" else self._find(which, runs)
        run = runs[-1]
        if lock:
            run.lock()
        try:
            if which in ("last", "auto") and not run.candidates():
                say(f"{which}: {run.folder} was stopped before its first checkpoint: it is started again there")
                return run, None
            return run, self._find(which, runs, first=lock)
        except UserError:
            run.release()
            raise

    def _find(self, which: str, runs: list[Run], *, hold: bool = False, first: bool | None = None) -> Found:
        if not runs:
            fix = "Train one with fit, or name a file" if hold else "Leave --ckpt_path out to start one"
            raise UserError(f"--ckpt_path {which}: no run below {self.folder}. {fix}.")
        try:
            return runs[-1].find(which, hold=hold, first=first)
        except MissingCheckpointError as error:
            older = next((paths[0] for run in reversed(runs[:-1]) if (paths := run.candidates())), None)
            such = "" if older is None else f", such as {older} of an older run"
            raise UserError(f"--ckpt_path {which}: {error}{such}.") from None


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn whatever keeps a run's folder from being made into a `UserError`; that it is there stays as it is."""
    try:
        yield
    except FileExistsError:
        if folder.is_dir():
            raise
        raise UserError(f"trainer.default_root_dir: {folder} is a file. Give another folder.") from None
    except OSError as error:
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror
        shown = str(folder) if len(str(folder)) < 200 else f"{str(folder)[:200]}..."
        raise UserError(
            f"trainer.default_root_dir: {shown} cannot be written ({reason}). Give another folder, or mend that."
        ) from error
