"""What `plan` says against whole runs of the command line: budgets kept, wall time foretold, the cost of a plan.

Every row is printed to standard error as it comes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from leanbert.units import MIB, format_size, parse_size
from report import table

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.05
BUDGETS = {  # sequences a step, and budgets from loose to tight: each next rung of the ladder is the choice of one
    "base": (16, ["3.25GiB", "2.6GiB", "2.3GiB", "1.9GiB", "1.15GiB"]),
    "large": (8, ["7GiB", "5.75GiB", "4.75GiB", "2.75GiB", "1.75GiB"]),
}
TIMED = {"mini": 32, "small": 8}  # sequences a step
TEN_BILLION = [
    "--model.encoder.num_layers=48", "--model.encoder.hidden_size=4096", "--model.encoder.num_heads=32",
    "--data.vocab_size=30522",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """How a command ended, what it took, and what it said; `peak_bytes` is the resident memory of all its processes."""

    code: int
    seconds: float
    peak_bytes: int
    error: str


@dataclass(frozen=True)
class Finished:
    """A run of `fit`: its peak resident memory, the live tensors that it sampled itself, and whether all was done."""

    peak_bytes: int
    live_bytes: int
    complete: bool


def command(subcommand: str, *arguments: str) -> Run:
    """Run a subcommand of `train.py` and sample its memory from outside."""
    words = [sys.executable, "train.py", subcommand, "--config=configs/mlm.yaml", *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid), highest_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        errors.seek(0)
        return Run(process.returncode, seconds, peak, errors.read())


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children now."""
    try:
        process = psutil.Process(pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def highest_bytes(pid: int) -> int:
    """Return the highest resident memory of one process so far, as the kernel has noted it."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 0 if found is None else int(found[1]) * 1024


def say(cells: list[str]) -> None:
    """Print a row while the others are still to come."""
    print(" | ".join(cells), file=sys.stderr, flush=True)


# ---- budgets


def budget_section(root: Path) -> str:
    """Return what `fit --budget` needed, and what the most frugal of the candidates that are called cheaper needs."""
    rows, errors = [], []
    for size, (batch, budgets) in BUDGETS.items():
        known: dict[str, Finished] = {}  # by overlay: what is cheaper for one budget was chosen for another
        for budget in budgets:
            cells, error = budget_row(root, size, batch, budget, known)
            say(cells)
            rows.append(cells)
            errors += [] if error is None else [error]
    header = [
        "", "budget", "choice", "predicted RSS MiB", "peak RSS MiB", "error", "kept", "live error",
        "most frugal of the cheaper candidates", "its peak RSS MiB", "x budget",
    ]  # fmt: skip
    worst = max(map(abs, errors)) if errors else 0.0
    text = f"{len(errors)} of {len(rows)} runs finished; largest error of predicted peak RSS: {worst:.1%}."
    return f"{text}\n\n{table(header, rows)}"


def budget_row(
    root: Path, size: str, batch: int, budget: str, known: dict[str, Finished]
) -> tuple[list[str], float | None]:
    """Return a row of the table, and the error of the predicted resident memory if the run finished."""
    folder, limit = root / f"{size}-{budget}", parse_size(budget, "budget")
    found, error = finish(folder, size, batch, f"--budget={budget}")
    if found is None:
        return [size, budget, error, *[""] * 8], None
    plan = json.loads((version(folder) / "plan.json").read_text())
    place = next(index for index, candidate in enumerate(plan["candidates"]) if candidate["fits"])
    chosen, cheaper = plan["candidates"][place], plan["candidates"][:place]
    known[json.dumps(chosen["overlay"])] = found
    off = chosen["predicted_needs_bytes"] / found.peak_bytes - 1
    live_off = chosen["predicted_peak_bytes"] / found.live_bytes - 1
    kept = "yes" if found.peak_bytes <= limit and found.complete else "NO"
    cells = [size, budget, name(chosen), f"{chosen['predicted_needs_bytes'] / MIB:,.0f}"]
    cells += [f"{found.peak_bytes / MIB:,.0f}", f"{off:+.1%}", kept, f"{live_off:+.1%}"]
    return [*cells, *cheaper_cells(root, size, batch, cheaper, limit, known)], off


def cheaper_cells(
    root: Path, size: str, batch: int, cheaper: list[dict[str, Any]], limit: int, known: dict[str, Finished]
) -> list[str]:
    """Return name, peak resident memory and its ratio to the budget of the smallest candidate before the chosen one."""
    if not cheaper:
        return ["none", "", ""]
    least = min(cheaper, key=lambda candidate: candidate["predicted_needs_bytes"])
    key = json.dumps(least["overlay"])
    if key not in known:
        overlay = root / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(least["overlay"]))
        found, error = finish(root / f"{size}-cheaper-{len(known)}", size, batch, f"--config={overlay}")
        if found is None:
            return [f"{name(least)}: {error}", "", ""]
        known[key] = found
    return [name(least), f"{known[key].peak_bytes / MIB:,.0f}", f"{known[key].peak_bytes / limit:.2f}"]


def name(candidate: dict[str, Any]) -> str:
    """Return the techniques and the micro-batch of a candidate."""
    techniques = ", ".join(candidate["techniques"]) or "as given"
    return f"{techniques}; micro-batch {candidate['micro_batch_sequences']}"


def finish(folder: Path, size: str, batch: int, *more: str) -> tuple[Finished | None, str]:
    """Run two steps with validations and a checkpoint from plain float32 AdamW; return the last line if it failed."""
    plain = folder.with_suffix(".yaml")
    plain.write_text("trainer: {precision: 32-true}\nmodel: {init_args: {optimizer: {name: adamw, lr: 0.001}}}\n")
    done = command(
        "fit", f"--config=configs/size/{size}.yaml", f"--config={plain}", f"--data.batch_size={batch}",
        "--data.max_length=64", "--data.vocab_size=16384", "--trainer.max_steps=2", "--trainer.limit_val_batches=1",
        f"--trainer.default_root_dir={folder}", *more,
    )  # fmt: skip
    if done.code:
        return None, done.error.strip().splitlines()[-1]
    summary = json.loads((version(folder) / "summary.json").read_text())
    complete = summary["steps"] == 2 and "val/loss" in summary["metrics"] and os.path.exists(summary["checkpoint"])
    Path(summary["checkpoint"]).unlink(missing_ok=True)  # ten of them would fill a small disk
    return Finished(done.peak_bytes, summary["peak_bytes"], complete), ""


def version(folder: Path) -> Path:
    """Return the folder of the first run under a root."""
    return folder / "mlm" / "version_0"


# ---- time


def time_section(root: Path) -> str:
    """Return the wall time of 200 steps as foretold right before, measured, and foretold right after."""
    rows = []
    for size, batch in TIMED.items():
        arguments = [
            f"--config=configs/size/{size}.yaml", f"--data.batch_size={batch}", "--trainer.max_steps=200",
            "--trainer.limit_val_batches=10", f"--trainer.default_root_dir={root / size}",
        ]  # fmt: skip
        command("prepare", *arguments)  # tokenizer and cache are there: both sides time training
        before = foretold_seconds(root, arguments)
        done = command("fit", *arguments)
        after = foretold_seconds(root, arguments)
        cells = [size, f"{batch} x 128", *(f"{seconds:,.0f}" for seconds in (before, done.seconds, after))]
        rows.append([*cells, f"{before / done.seconds:.2f}", f"{after / done.seconds:.2f}"])
        say(rows[-1])
    header = ["", "sequences x tokens", "foretold before, s", "measured, s", "foretold after, s"]
    return table([*header, "before / measured", "after / measured"], rows)


def foretold_seconds(root: Path, arguments: list[str]) -> float:
    """Return the wall time of the run, from the start of its process to its end, that `plan --measure` foretells."""
    answer = root / "plan.json"
    command("plan", *arguments, "--measure", f"--json={answer}")
    return float(json.loads(answer.read_text())["time"]["seconds"])


# ---- the cost of a plan


def search_section(root: Path) -> str:
    """Return what a search over all candidates takes, for BERT-large and for ten billion parameters."""
    large = ["--config=configs/size/large.yaml", "--data.vocab_size=30522", "--target=cpu", "--budget=2GiB"]
    models = {"large": large, "48 x 4,096": [*TEN_BILLION, "--target=cuda", "--budget=80GiB"]}
    rows, answer = [], root / "plan.json"
    for size, arguments in models.items():
        done = command("plan", *arguments, "--data.batch_size=32", "--data.max_length=512", f"--json={answer}")
        plan = json.loads(answer.read_text())
        cells = [size, f"{plan['parameters']:,}", arguments[-2].split("=")[1], f"{len(plan['candidates'])}"]
        cells += [", ".join(plan["chosen"]), format_size(plan["predicted_needs_bytes"])]
        rows.append([*cells, f"{done.seconds:.0f}", format_size(done.peak_bytes)])
        say(rows[-1])
    return table(["", "parameters", "for", "candidates", "choice", "it needs", "wall s", "peak RSS"], rows)
