"""Training speed on a GPU against `transformers.Trainer`, a part of `benchmarks/gpu.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gpu_fits import Run, in_cell, predicted
from leanbert.planning.timing import PEAK_FLOPS
from leanbert.units import MIB
from speed import MASK_RATE, SIZES, fit_command, run_leanbert, run_peer

PEAK_BF16 = {
    "H100 PCIe": 756e12,  # NVIDIA H100 datasheet
    "H100 80GB HBM3": PEAK_FLOPS["h100-sxm"]["16"],
    "H200": PEAK_FLOPS["h200-sxm"]["16"],
}
"""Dense peaks of bf16 products in FLOP/s by part of the card's name."""


def peak_flops() -> float | None:
    """Return the known dense peak of this card in bf16; None: it is not known."""
    if not torch.cuda.is_available():
        return None
    named = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_BF16.items() if part in named), None)


def speed(run: Run) -> Iterator[list[str]]:
    """Yield the speed of the Trainer and of LeanBERT, those first that have an aim."""
    sizes = ["tiny"] if run.dry else [
        "base-128x128", "large-32x512", "base-32x512", "large-128x128", "base-16x2048", "large-16x2048",
    ]  # fmt: skip
    text, tokenizer = str(run.text()), None
    precision = ["--trainer.precision=32-true"] if run.dry else ["--trainer.precision=bf16-mixed"]
    bert = ["--model.encoder.preset=bert", "--model.encoder.attention_dropout=0", "--model.optimizer.name=adamw"]
    common = [f"--trainer.accelerator={run.device}", f"--data.cache_dir={run.folder / 'cache'}"]
    ours = [*common, *precision, *bert, f"--data.mask_rate={MASK_RATE}"]
    for size in sizes:
        if tokenizer is None:
            first = run_leanbert(size, [*ours, "--trainer.max_steps=11"], text, None, run.folder)
            tokenizer = Path(first["run"]) / "tokenizer"
        flops = flops_per_token(size, ours, text, tokenizer, run)
        competitors = {
            "Trainer": (run_peer, ["--attention-dropout=0", *([] if run.dry else ["--bf16", "--compile"])]),
            "LeanBERT": (run_leanbert, [*ours, *([] if run.dry else ["--model.compile=true"])]),
        }
        found: dict[str, dict[str, Any]] = {}
        for who, (train, more) in competitors.items():
            try:
                found[who] = train(size, more, text, tokenizer, run.folder)
                yield speed_row(size, who, found, flops)
            except SystemExit as error:
                yield [size, who, in_cell(str(error)), "", "", "", ""]


def flops_per_token(size: str, more: Sequence[str], text: str, tokenizer: Path, run: Run) -> float:
    """Return the operations of products and attention that a step of ours counts, over its tokens."""
    batch, length = SIZES[size][3:5]
    arguments = fit_command(size, text, tokenizer, run.folder)[3:]
    return predicted([*arguments, *more], run.device).flops / (batch * length)


def speed_row(size: str, who: str, found: dict[str, dict[str, Any]], flops: float) -> list[str]:
    """Return the cells of one competitor."""
    result, peak = found[who], peak_flops()
    tokens = result["tokens_per_second"]
    share = "unknown" if peak is None else f"{tokens * flops / peak:.1%}"
    times = f"{tokens / found['Trainer']['tokens_per_second']:.2f}" if "Trainer" in found else ""
    highest_mib = "" if result["peak_bytes"] is None else f"{result['peak_bytes'] / MIB:,.0f}"
    return [size, who, f"{tokens:,.0f}", f"{1000 * result['step_seconds']:,.1f}", times, share, highest_mib]
