"""Speed and memory of LeanBERT's `fit` against `transformers.Trainer`, in one run, on the same text.

    python benchmarks/speed.py                      # embedded text, both sizes, about 25 minutes on 2 cores
    python benchmarks/speed.py --sizes mini --rounds 1

Each competitor is a process of its own; rounds alternate, and medians over rounds are reported. The first 10 steps
of each process are not timed. "LeanBERT, BERT" is the same architecture, dropout (0.1), optimizer (AdamW) and
masking rate (15 %) as the peer's; "LeanBERT, default" is `configs/mlm.yaml` (modern preset, Muon).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from leanbert.data.samples.docstrings import embedded_corpus
from leanbert.units import format_size
from report import table, write_section

ROOT = Path(__file__).parents[1]
SIZES = {  # layers, hidden, heads, sequences a step, tokens a sequence, vocabulary, steps
    "mini": (4, 256, 4, 32, 128, 16_384, 50),
    "base": (12, 768, 12, 8, 128, 30_522, 22),
    "base-128x128": (12, 768, 12, 128, 128, 30_522, 60),
    "base-32x512": (12, 768, 12, 32, 512, 30_522, 60),
    "base-16x2048": (12, 768, 12, 16, 2048, 30_522, 40),
    "large-128x128": (24, 1024, 16, 128, 128, 30_522, 40),
    "large-32x512": (24, 1024, 16, 32, 512, 30_522, 40),
    "large-16x2048": (24, 1024, 16, 16, 2048, 30_522, 30),
    "tiny": (2, 128, 2, 8, 32, 512, 14),
}
MASK_RATE = 0.15
SAME_AS_PEER = [
    "--model.encoder.preset=bert",
    "--model.optimizer.name=adamw",
    "--model.optimizer.lr=5e-5",
    f"--data.mask_rate={MASK_RATE}",
]
COMPETITORS = {
    "Trainer, default (fp32)": None,
    "Trainer, bf16": ["--bf16"],
    "LeanBERT, BERT": SAME_AS_PEER,
    "LeanBERT, default": [f"--data.mask_rate={MASK_RATE}"],
}


def matmul_flops(dtype: torch.dtype, size: int = 2048, seconds: float = 1.0) -> float:
    """Return the floating-point operations per second of square matrix products on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    while sum(times) < seconds:
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def useful_flops_per_token(size: str) -> float:
    """Return the operations that one token of BERT training needs: 3 x forward, head on masked positions only."""
    layers, hidden, _, _, length, vocabulary, _ = SIZES[size]
    block = 2 * 12 * hidden**2 + 4 * length * hidden  # weights of a block; scores and their use
    head = 2 * MASK_RATE * (hidden**2 + hidden * vocabulary)
    return 3 * (layers * block + head)


def run_peer(size: str, extra: list[str], text: str, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Train with the Trainer and return its figures."""
    layers, hidden, heads, batch, length, _, steps = SIZES[size]
    out = folder / "peer.json"
    finished = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/peer.py"), f"--tokenizer={tokenizer}", f"--train={text}",
         f"--out={out}", f"--layers={layers}", f"--hidden={hidden}", f"--heads={heads}", f"--batch={batch}",
         f"--length={length}", f"--steps={steps}", *extra],
        capture_output=True, text=True,
    )  # fmt: skip
    if finished.returncode:
        raise SystemExit(finished.stderr)
    return json.loads(out.read_text())


def fit_command(size: str, text: str, tokenizer: Path | None, folder: Path) -> list[str]:
    """Return the command line that trains this size with LeanBERT."""
    layers, hidden, heads, batch, length, vocabulary, steps = SIZES[size]
    return [
        sys.executable, str(ROOT / "train.py"), "fit", f"--config={ROOT / 'configs/mlm.yaml'}",
        f"--model.encoder.num_layers={layers}", f"--model.encoder.hidden_size={hidden}",
        f"--model.encoder.num_heads={heads}", f"--model.encoder.max_positions={max(512, length)}",
        f"--data.batch_size={batch}", f"--data.max_length={length}",
        f"--data.vocab_size={vocabulary}", f"--data.train_files={text}", f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={folder / 'runs'}",
        *([] if tokenizer is None else [f"--data.tokenizer={tokenizer}"]),
    ]  # fmt: skip


def run_leanbert(size: str, extra: list[str], text: str, tokenizer: Path | None, folder: Path) -> dict[str, Any]:
    """Train with LeanBERT and return its figures."""
    batch, length = SIZES[size][3:5]
    command = [*fit_command(size, text, tokenizer, folder), *extra]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(finished.stderr)
    newest = max((folder / "runs/mlm").iterdir(), key=lambda run: int(run.name.split("_")[1]))
    summary = json.loads((newest / "summary.json").read_text())
    return {**summary, "step_seconds": batch * length / summary["tokens_per_second"], "run": str(newest)}


def compare(size: str, text: str, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return the median figures of each competitor."""
    first = run_leanbert(size, ["--trainer.max_steps=11"], text, None, folder)  # also trains the tokenizer
    tokenizer = Path(first["run"]) / "tokenizer"
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in COMPETITORS}
    for round_number in range(rounds):
        for name, extra in COMPETITORS.items():
            peer = name.startswith("Trainer")
            run = run_peer if peer else run_leanbert
            results[name].append(run(size, extra or [], text, tokenizer, folder))
            print(f"{size} round {round_number + 1}: {name}: {results[name][-1]['tokens_per_second']:.0f} tokens/s",
                  file=sys.stderr, flush=True)  # fmt: skip
    figures = ("tokens_per_second", "step_seconds", "peak_rss_bytes")
    return {
        name: {figure: statistics.median(run[figure] for run in runs) for figure in figures}
        for name, runs in results.items()
    }


def rows_of(size: str, results: dict[str, dict[str, float]], peaks: dict[str, float]) -> list[list[str]]:
    """Return the table rows of one size."""
    fp32, bf16 = (results[name]["tokens_per_second"] for name in list(COMPETITORS)[:2])
    rows = []
    for name, result in results.items():
        speed = result["tokens_per_second"]
        share = speed * useful_flops_per_token(size) / peaks["fp32" if "fp32" in name else "bf16"]
        rows.append([
            size, name, f"{speed:,.0f}", f"{1000 * result['step_seconds']:,.0f}", f"{speed / fp32:.2f}",
            f"{speed / bf16:.2f}", f"{share:.0%}", format_size(result["peak_rss_bytes"]),
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["mini", "base-128x128", "base-32x512"] if torch.cuda.is_available() else ["mini", "base"]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=default)
    parser.add_argument("--text", help="text file, documents separated by blank lines; default: the embedded corpus")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    peaks = {"fp32": matmul_flops(torch.float32), "bf16": matmul_flops(torch.bfloat16)}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        text = options.text or str(embedded_corpus(Path(folder)))
        for size in options.sizes:
            rows += rows_of(size, compare(size, text, options.rounds, Path(folder)), peaks)
    header = ["size", "", "tokens/s", "ms a step", "x Trainer fp32", "x Trainer bf16", "of matmul peak", "peak RSS"]
    note = (
        f"Measured matrix products: {peaks['fp32'] / 1e9:,.0f} GFLOP/s in fp32, {peaks['bf16'] / 1e9:,.0f} in bf16. "
        f'Medians of {options.rounds} alternating rounds. "LeanBERT, BERT" is the peer\'s architecture, dropout, '
        'optimizer and masking rate; "LeanBERT, default" is `configs/mlm.yaml`. The share counts useful operations '
        "only (head on masked positions), for all alike. The peer holds the text in memory, LeanBERT maps it."
    )
    write_section("speed", "Training speed against transformers.Trainer", f"{table(header, rows)}\n\n{note}")


if __name__ == "__main__":
    main()
