"""Training inside another subcommand: a run of `fit` in a process of its own, resumed if it stopped."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from leanbert.checkpoints import BEST
from leanbert.compression.steps import PRUNING, Step, callbacks_of
from leanbert.errors import UserError
from leanbert.files import write_text_atomically
from leanbert.messages import say
from leanbert.runs import TaskRuns
from leanbert.tasks.distillation import START

SETTINGS = ("seed_everything", "trainer", "model", "data", "checkpoint")


def student_settings(given: dict[str, Any], source: Path, cuts: Sequence[Step], steps: int) -> dict[str, Any]:
    """Return the settings of a run in which what the cuts leave of the model at `source` learns from all of it."""
    settings = yaml.safe_load(yaml.safe_dump({name: given[name] for name in SETTINGS}))
    model, trainer = settings["model"]["init_args"], settings["trainer"]
    model["init_from"] = str(source.resolve())
    model["distillation"] = {**(model["distillation"] or {})}
    model["distillation"]["teacher"] = model["distillation"].get("teacher") or START
    trainer["max_steps"], trainer["max_epochs"] = steps, None
    trainer["callbacks"] = [*(trainer["callbacks"] or []), *callbacks_of(cuts)]
    return settings


def train_student(settings: dict[str, Any], cuts: Sequence[Step], task: str, folder: Path) -> Path:
    """Run `fit` with these settings, or go on with the run that was interrupted, and return its checkpoint.

    It is the best, but where weights became zero step by step the last. Raises `UserError` if the run fails.
    """
    text = yaml.safe_dump(settings, sort_keys=False)
    name = "+".join([*(step.slug for step in cuts), hashlib.sha256(text.encode()).hexdigest()[:8]])
    root = folder / name
    settings["trainer"]["default_root_dir"] = str(root)
    root.mkdir(parents=True, exist_ok=True)
    config = root / "config.yaml"
    write_text_atomically(config, yaml.safe_dump(settings, sort_keys=False))
    say(f"Training     {root}, {settings['trainer']['max_steps']:,} steps")
    command = [sys.executable, sys.argv[0], "fit", f"--config={config}", "--ckpt_path=auto"]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"train: the run in {root} has ended early, see above. The same command goes on with it")
    run = TaskRuns(str(root), task).all()[-1]
    best = run.checkpoints / BEST
    gradual = any(step.name == PRUNING for step in cuts)
    return best if best.is_file() and not gradual else run.find("last").path
