"""All that one GPU can show in nine minutes: it checks and measures at once, the cheapest first.

    python benchmarks/gpu.py --report gpu.md                           # everything, on one GPU
    python benchmarks/gpu.py --report gpu.md --parts speed             # one part, with all the time
    python benchmarks/gpu.py --report gpu.md --dry-run                 # everything but CUDA, tiny, in minutes on a CPU

Each part is a process of its own with its own time limit, and gives its rows one by one: its section is written to the
report when it ends, whole or cut, so that a cut loses only what comes after. Nothing is downloaded; the text is made on
the spot. A section of the report takes the place of the one that was there, so `--report docs/benchmarks.md` works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import gpu_parts
import gpu_speed
from gpu_fits import Run
from report import table, write_section

FOLDER = Path(__file__).parent
GRACE_SECONDS = 10
"""That a part has to end after its limit, before it is killed."""


@dataclass(frozen=True)
class Part:
    """One section of the report: `rows` yields the cells of its table, `seconds` is the most that it may take."""

    title: str
    seconds: float
    header: list[str]
    rows: Callable[[Run], Iterator[list[str]]]
    note: str = ""


PARTS = {  # the cheapest first
    "card": Part("The card", 60, ["", ""], gpu_parts.card),
    "synchronisations": Part(
        "Synchronisations in a step", 60, ["task", "in 5 steps", "where"], gpu_parts.synchronisations,
        "Operations in steps 4 to 8 of `fit` for which the host waits (`torch.cuda.set_sync_debug_mode`); on a CPU, "
        "values that are read back. The loss that the log shows every `log_every_n_steps` is not among them.",
    ),
    "tests": Part("Tests that need CUDA", 120, ["test", ""], gpu_parts.tests, "`pytest -m cuda`"),
    "equality": Part(
        "Losses and gradients against the CPU", 60,
        ["task", "step", "loss on the CPU", "loss", "difference", "largest difference of a gradient"],
        gpu_parts.equality,
        "Same weights and batches, float32. Of gradients the norm of the difference of each over its own norm.",
    ),
    "budgets": Part(
        "Budgets kept on a GPU", 100,
        ["", "budget MiB", "choice", "predicted MiB", "reserved and context, MiB", "kept"], gpu_parts.budgets,
        "`fit --budget` from plain float32 AdamW, several at a time; budgets are shares of what that needs as planned.",
    ),
    "plan": Part(
        "Predicted against allocated memory", 100,
        ["", "sequences x tokens", "techniques", "predicted MiB", "allocated MiB", "error"], gpu_parts.plan,
        "The peak of `torch.cuda.max_memory_allocated` from the second step on, without what cuBLAS keeps.",
    ),
    "profile": Part(
        "Profile of the card", 120, ["", ""], gpu_parts.profile,
        "Bytes of the context, what the allocator holds on top, and steps in bf16, as `plan --device FILE` reads them.",
    ),
    "memory": Part(
        "Memory techniques on a GPU", 100,
        ["", "peak MiB", "x plain", "ms a step", "x plain", "loss of the last step"], gpu_parts.memory,
        "Median time of the steps after the second; plain is float32 AdamW.",
    ),
    "speed": Part(
        "Training speed on a GPU against transformers.Trainer", 480,
        ["size", "", "tokens/s", "ms a step", "x Trainer", "of the bf16 peak", "peak MiB"], gpu_speed.speed,
        "The same BERT, AdamW, masking rate and dropout (of attention none) for both, in bf16 with torch.compile; the "
        "Trainer with SDPA. Shares are of the products that our step counts (`leanbert.measure.flops`), for both.",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--report", type=Path, required=True, help="Markdown file whose sections are replaced")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--rows-of", choices=PARTS, help=argparse.SUPPRESS)  # a part in its own process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows_of:
        give_rows(options.rows_of, Run(options.folder, options.dry_run))
        return
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("there is no CUDA device here: give --dry-run")
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            alone = len(options.parts) == 1
            limit = min(end - time.monotonic(), float("inf") if alone else PARTS[name].seconds)
            body = run_part(name, limit, Path(folder), options.dry_run)
            write_section(f"gpu-{name}", PARTS[name].title, body, options.report)


def give_rows(name: str, run: Run) -> None:
    """Write the rows of a part as they come, one JSON array a line."""
    with open(run.folder / f"{name}.jsonl", "w") as file:
        for row in PARTS[name].rows(run):
            print(json.dumps(row), file=file, flush=True)


def run_part(name: str, limit: float, folder: Path, dry: bool) -> str:
    """Return the section of a part that had `limit` seconds: its rows as far as they came, and how it ended."""
    if limit <= 0:
        return "Not run: the time was up."
    log, started = folder / f"{name}.log", time.monotonic()
    words = [sys.executable, __file__, f"--rows-of={name}", f"--folder={folder}", "--report=none"]
    with open(log, "w") as messages:
        process = subprocess.Popen(
            [*words, *(["--dry-run"] if dry else [])], stdout=messages, stderr=messages, cwd=FOLDER.parent,
            start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(limit)
            how = f"Took {time.monotonic() - started:.0f} s."
        except subprocess.TimeoutExpired:
            code, how = 0, f"Cut after {limit:.0f} s."
        finally:
            end(process)
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        how = f"Failed after {time.monotonic() - started:.0f} s: {lines[-1] if lines else f'exit code {code}'}"
        print("\n".join(lines[-30:]), file=sys.stderr)
    rows = [json.loads(line) for line in read_lines(folder / f"{name}.jsonl")]
    return "\n\n".join(filter(None, [table(PARTS[name].header, rows), PARTS[name].note, how]))


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE_SECONDS)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def read_lines(path: Path) -> list[str]:
    """Return the whole lines of a file; none if it is not there."""
    return [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.is_file() else []


if __name__ == "__main__":
    main()
