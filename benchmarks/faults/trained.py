"""Trained models of the tasks, made once and copied by experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .forks import Outcome, Process, command, fresh, once
from .samples import TASKS, command_of, write_samples

TRAIN = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--checkpoint.every_n_steps=2")


@dataclass(frozen=True)
class Base:
    """A trained model of a task: its folder with samples, caches and runs, the export, and what validation says."""

    folder: Path
    answers: tuple[str, ...]

    @property
    def run(self) -> Path:
        """The folder of the run."""
        return next((self.folder / "runs").glob("*/version_0"))

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run."""
        return self.run / "tokenizer" / "tokenizer.json"


def base_of(task: str, work: Path) -> Base:
    """Return the trained model of a task."""
    folder = work / f"base-{task}"

    def make() -> tuple[str, ...]:
        write_samples(fresh(folder))
        done_well(folder, command_of(task, "fit", *TRAIN))
        if task in ("mlm", "classification", "tagging"):
            done_well(folder, command_of(task, "export", "--ckpt_path=last", "--output=export"))
        steps = [f"runs/{TASKS[task].runs}/version_0/checkpoints/step-{step:08d}.ckpt" for step in (2, 4)]
        return tuple(done_well(folder, command_of(task, "validate", f"--ckpt_path={path}")).stdout for path in steps)

    return Base(folder, once(folder.with_suffix(".made"), make))


def done_well(folder: Path, arguments: list[str]) -> Outcome:
    """Return how a command ended, which must succeed."""
    done = Process(command(arguments), folder).wait()
    if done.code:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return done
