"""Each task plain, with `configs/memory/lean.yaml` and within a budget: quality, and peak memory against the plan.

    python benchmarks/task_memory.py    # half an hour on 2 cores

2 x 128 on the embedded samples. All three go on, for as many steps and with AdamW, from one model that the task's
configuration has trained: what differs is the techniques. The budget takes four tenths of the live tensors away from
what the plain run is predicted to need. On a processor without 16-bit matrix products, where they would take hours,
`lean` is run in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from leanbert.memory.precision import has_16_bit_products
from leanbert.units import MIB
from report import table, write_section

ROOT = Path(__file__).parents[1]
TASKS = {  # what the task logs under, and its metric
    "classification": ("classification", "accuracy"),
    "srl": ("srl", "f1"),
    "translation": ("seq2seq", "bleu"),
    "summarization": ("seq2seq", "rougeL"),
}
SIZE = ["--model.encoder.num_layers=2", "--model.encoder.hidden_size=128", "--model.encoder.num_heads=2"]
PLAIN = ["--model.optimizer.name=adamw", "--model.optimizer.lr=1e-3"]
IN_POINTS = {"bleu", "rougeL"}  # the others are shares
AS_GIVEN = "--budget=64GiB"  # changes nothing, and makes the run compare itself with its plan
TAKEN = 0.4  # of the plain run's live tensors


def arguments_of(task: str, folder: Path, overlay: Path | None = None) -> list[str]:
    """Return the arguments of a run; configurations come first."""
    overlays = [] if overlay is None else [f"--config={overlay}"]
    whole = ["--model.validation_sources=100000"] if TASKS[task][0] == "seq2seq" else []
    return [f"--config=configs/{task}.yaml", *overlays, *SIZE, *whole, f"--trainer.default_root_dir={folder}"]


def call(subcommand: str, *arguments: str) -> None:
    """Run a subcommand of `train.py` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "train.py", subcommand, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{subcommand} {' '.join(arguments)}: {done.stderr[-2000:]}")


def fit(task: str, folder: Path, steps: int, *more: str, overlay: Path | None = None) -> dict[str, Any]:
    """Train, and return the run's summary, its folder in it."""
    length = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    call("fit", *arguments_of(task, folder, overlay), *length, *more)
    run = folder / TASKS[task][0] / "version_0"
    return {**json.loads((run / "summary.json").read_text()), "folder": run}


def lean(root: Path) -> Path:
    """Return `lean`, without 16-bit numbers where the processor multiplies them too slowly."""
    overlay = yaml.safe_load((ROOT / "configs" / "memory" / "lean.yaml").read_text())
    if not has_16_bit_products("cpu"):
        callbacks = overlay["trainer"]["callbacks+"]
        overlay["trainer"]["callbacks+"] = [one for one in callbacks if "Precision" not in one["class_path"]]
    path = root / "lean.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return path


def budget(task: str, folder: Path, *more: str) -> str:
    """Return a budget that the plain run does not fit."""
    answer = folder.with_suffix(".json")
    call("plan", *arguments_of(task, folder), *more, f"--json={answer}")
    plan = json.loads(answer.read_text())
    return f"{(plan['predicted_rss_bytes'] - TAKEN * plan['predicted_peak_bytes']) / MIB:.0f}MiB"


def rows_of(task: str, root: Path, steps: int) -> list[list[str]]:
    """Return the rows of a task."""
    start = fit(task, root / f"{task}-start", steps)
    same = [f"--model.init_from={start['checkpoint']}"]
    limit = budget(task, root / f"{task}-plan", *PLAIN, *same)
    runs = {
        "plain": fit(task, root / f"{task}-plain", steps, *same, *PLAIN, AS_GIVEN),
        "lean": fit(task, root / f"{task}-lean", steps, *same, AS_GIVEN, overlay=lean(root)),
        limit: fit(task, root / f"{task}-budget", steps, *same, *PLAIN, f"--budget={limit}"),
    }
    rows, metric = [], TASKS[task][1]
    points = {way: run["metrics"][f"val/{metric}"] * (1 if metric in IN_POINTS else 100) for way, run in runs.items()}
    for way, run in runs.items():
        chosen = ", ".join(json.loads((run["folder"] / "plan.json").read_text())["chosen"])
        peak, resident = run["peak_bytes"], run["peak_rss_bytes"]
        rows.append(
            [task, f"{way}: {chosen}" if chosen else way, f"{points[way]:.2f} {metric}",
             f"{points[way] - points['plain']:+.2f}", f"{peak / MIB:.1f}",
             f"{100 * (run['predicted_peak_bytes'] / peak - 1):+.2f} %", f"{resident / MIB:,.0f}"]
        )  # fmt: skip
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--steps", type=int, default=200, help="of the model to start from, and of each run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for task in options.tasks for row in rows_of(task, Path(folder), options.steps)]
    header = ["", "", "all of validation", "against plain", "peak live MiB", "error of the plan", "peak RSS MiB"]
    note = f"2 x 128, {options.steps} steps from one model that was trained for {options.steps}."
    if not has_16_bit_products("cpu"):
        note += " `lean` without its 16-bit numbers: this processor has no such matrix products."
    write_section("task-memory", "Tasks with little memory", f"{table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
