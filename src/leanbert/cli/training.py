"""Training inside another subcommand: a run of `fit` in a process of its own, resumed if it stopped."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from leanbert import signals
from leanbert.checkpoints import BEST
from leanbert.compression.steps import METHODS, ZEROS, Step, as_callbacks
from leanbert.data.store.checksums import files_digests
from leanbert.errors import REFUSED, UserError
from leanbert.files import write_text_atomically
from leanbert.messages import say
from leanbert.runs import TaskRuns
from leanbert.tasks.teachers import START

SETTINGS = ("seed_everything", "trainer", "model", "data", "checkpoint")
PROGRAM = "import sys; sys.argv[0] = 'leanbert'; from leanbert.cli import main; main()"


def student_settings(given: dict[str, Any], source: Path, cuts: Sequence[Step], steps: int) -> dict[str, Any]:
    """Return the settings of a run in which what the cuts leave of the model at `source` learns from all of it."""
    settings = copy.deepcopy({name: given[name] for name in SETTINGS})
    model, trainer = settings["model"]["init_args"], settings["trainer"]
    cutting = {method.callback[0] for method in METHODS.values() if method.callback is not None}
    given_callbacks = trainer["callbacks"] or []  # of which the cuts say what leaves
    own = [callback for callback in given_callbacks if callback["class_path"].rpartition(".")[2] not in cutting]
    model["init_from"] = str(source.resolve())
    model["distillation"] = {**(model["distillation"] or {})}
    model["distillation"]["teacher"] = model["distillation"].get("teacher") or START
    trainer["max_steps"], trainer["max_epochs"] = steps, None
    trainer["callbacks"] = [*own, *as_callbacks(cuts)]
    return settings


def train_student(settings: dict[str, Any], cuts: Sequence[Step], task: str, folder: Path) -> Path:
    """Run `fit` with these settings, or go on with the run that was interrupted, and return its checkpoint.

    It is the best, but where weights became zero step by step the last. Raises `UserError` if the run fails, and ends
    the program if it is refused.
    """
    model, steps = settings["model"]["init_args"], settings["trainer"]["max_steps"]
    sources = {model["init_from"], model["distillation"]["teacher"]} - {START}
    known = [
        yaml.safe_dump(settings, sort_keys=False),
        *(d for source in sorted(sources) for d in files_digests(Path(source))),
    ]
    digest = hashlib.sha256("".join(known).encode()).hexdigest()[:8]
    root = folder / "+".join([*(step.slug for step in cuts), digest])
    settings["trainer"]["default_root_dir"] = str(root)
    root.mkdir(parents=True, exist_ok=True)
    config = root / "config.yaml"
    write_text_atomically(config, yaml.safe_dump(settings, sort_keys=False))
    say(f"Training     {root}, {steps:,} steps")
    code = signals.run([sys.executable, "-c", PROGRAM, "fit", f"--config={config}", "--ckpt_path=auto"])
    if code == REFUSED:
        sys.exit(code)  # it has said why
    runs = TaskRuns(str(root), task).all()
    if code or not runs or not runs[-1].finished_at(steps):
        raise UserError(f"train: the run in {root} has ended early, see above. The same command goes on with it")
    run = runs[-1]
    best = run.checkpoints / BEST
    gradual = any(step.name in ZEROS for step in cuts)
    return best if best.is_file() and not gradual else run.find("last").path
