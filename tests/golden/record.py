"""Losses and planned peaks of this code, as files that later code is compared with.

    python -m tests.golden.record                # write tests/golden/losses.json and peaks.json, 5 minutes
    python -m tests.golden.record --check        # compare bit for bit; exit code 1 and the differences if there are any
    python -m tests.golden.record --only srl     # only the runs whose name has this in it

Losses are those of 20 steps in float32 on one thread. They are the same bit for bit only on the processor that recorded
them: `tests/test_golden.py` allows for another one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.cli.options import Options
from leanbert.data.samples.synthetic import synthetic_roles
from leanbert.errors import UserError
from leanbert.planning.predict import predict
from tests.corpus import write_corpus
from tests.training import scalars

LOSSES, PEAKS = (Path(__file__).parent / name for name in ("losses.json", "peaks.json"))
TASKS = ("mlm", "translation", "summarization", "srl", "classification")
OVERLAYS = sorted(path.stem for path in Path("configs/memory").glob("*.yaml"))
TINY = (
    "--model.encoder.num_layers=2", "--model.encoder.hidden_size=32", "--model.encoder.num_heads=2",
    "--data.max_length=48", "--data.vocab_size=300",
    "--trainer.max_steps=20", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
)  # fmt: skip
OWN = {
    "translation": ("--model.validation_sources=0",),
    "summarization": ("--model.validation_sources=0", "--data.max_target_length=24"),
}
"""Settings of one task."""
RUNS = [(task, overlay) for task in TASKS for overlay in ("plain", *OVERLAYS)]
PLANS = [
    *(("mlm", "mini", overlay) for overlay in ("plain", *OVERLAYS)),
    *((task, "mini", overlay) for task in TASKS[1:] for overlay in ("plain", "lean")),
    *(("mlm", "large", overlay) for overlay in ("plain", "accumulation", "layer_major", "lean")),
]


class Settings(CLI):
    """The command line, which keeps what `plan` would plan."""

    def plan(self, options: Options) -> None:
        """Plan nothing."""
        self.settings = self.run_settings()


def command(folder: Path, task: str, *overlays: str) -> list[str]:
    """Return the options of a task with overlays of `configs/`, such as `memory/lean`; in float32 by default."""
    file = folder / ("mlm.txt" if task == "mlm" else f"{task}.jsonl")
    overlays = tuple(name for name in overlays if name != "memory/plain")
    decides = any(name in overlay for overlay in overlays for name in ("bf16", "fp16", "lean"))
    precision = [] if decides else ["--trainer.precision=32-true"]
    return [
        *(f"--config=configs/{name}.yaml" for name in (task, *overlays)), *precision,
        f"--data.train_files={file}", f"--data.val_files={file}", f"--data.cache_dir={folder / 'cache'}",
    ]  # fmt: skip


def write_files(folder: Path) -> None:
    """Write the texts of all tasks into `folder`."""
    write_corpus(folder / "mlm.txt")
    chance = random.Random(0)
    texts = [line for line in (folder / "mlm.txt").read_text(encoding="utf-8").splitlines() if line]
    rows: dict[str, list[dict[str, Any]]] = {
        "translation": [{"source": text, "target": " ".join(text.lower().split()[::-1])} for text in texts],
        "summarization": [{"source": text, "target": " ".join(text.split()[:3])} for text in texts],
        "classification": [{"text": text, "label": chance.choice(("farm", "town"))} for text in texts],
        "srl": synthetic_roles(400, 1, 1)["train"],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def losses(folder: Path, task: str, overlay: str) -> list[float] | str:
    """Return the training losses of a run, or why it is refused."""
    rows = 12 if overlay in ("accumulation", "adama") else 6  # micro-batches of 8
    options = [*command(folder, task, f"memory/{overlay}"), *TINY, *OWN.get(task, ()), f"--data.batch_size={rows}"]
    try:
        return list(
            scalars(CLI(["fit", *options, f"--trainer.default_root_dir={folder / 'runs' / overlay}"]))[
                "train/loss"
            ].values()
        )
    except UserError as refused:
        return str(refused)


def peaks(folder: Path, task: str, size: str, overlay: str) -> dict[str, int] | str:
    """Return the planned peak of live bytes by phase, or why the run is refused; as on a CPU with 16-bit products."""
    try:
        settings = Settings(["plan", *command(folder, task, f"size/{size}", f"memory/{overlay}")]).settings
        with mock.patch("leanbert.optim.muon.has_16_bit_products", return_value=True):
            return predict(settings).by_phase
    except UserError as refused:
        return str(refused)


def compute(only: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return losses and peaks by name, of the runs whose name has `only` in it."""
    quiet_libraries()
    torch.set_num_threads(1)
    runs = {f"{task} {overlay}": (task, overlay) for task, overlay in RUNS}
    plans = {f"{task} {size} {overlay}": (task, size, overlay) for task, size, overlay in PLANS}
    shown = {"file": sys.stderr, "disable": not sys.stderr.isatty()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder)
        return (
            {name: losses(folder, *run) for name, run in tqdm(runs.items(), **shown) if only in name},
            {name: peaks(folder, *plan) for name, plan in tqdm(plans.items(), **shown) if only in name},
        )


def main() -> int:
    """Record, or compare and return how many differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is recorded")
    parser.add_argument("--only", default="", help="only the runs whose name has this in it")
    options = parser.parse_args()
    differences = 0
    for file, found in zip((LOSSES, PEAKS), compute(options.only), strict=True):
        recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not options.check:
            lines = (f'  "{name}": {json.dumps(value)}' for name, value in sorted({**recorded, **found}.items()))
            file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            continue
        for name, value in found.items():
            if value != recorded[name]:
                differences += 1
                print(f"{name}\n  recorded {recorded[name]}\n  now      {value}")
    return differences


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(min(main(), 1))
