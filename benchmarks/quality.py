"""Learning curves of both presets: mini, 4 x 256, vocabulary 16,384, 3,600 steps of 32 x 128 tokens.

    python benchmarks/quality.py --train corpus/train.txt.gz --val corpus/val.txt.gz
    python benchmarks/quality.py --train corpus/train.txt.gz --val corpus/val.txt.gz --peer   # the Trainer too

Writes the table and the figure of docs/benchmarks.md. About 25 minutes a preset on 2 cores, the peer an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from report import table, write_section

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "mlm_curve.png"
BATCH, LENGTH, VOCABULARY = 32, 128, 16_384
PRESETS = {
    "modern": ("LeanBERT, modern preset", []),
    "bert": ("LeanBERT, original BERT", ["--config=configs/bert.yaml"]),
}
# transformers.Trainer, BertForMaskedLM, AdamW 1e-3, 200 steps of warm-up, linear, bf16, 15 % masked, on the same
# text, tokenizer size and batch, once on 2 cores of an AMD EPYC: (step, validation loss, seconds); None: not noted.
PEER = [(400, 6.70, 444), (800, 6.47, None), (1200, 6.33, None), (2000, 6.26, None), (2800, 6.21, None),
        (3600, 6.15, 3763)]  # fmt: skip
Curve = list[tuple[int, float, float | None]]


def train(preset: str, options: argparse.Namespace) -> tuple[Curve, Path]:
    """Train one preset and return its validation curve (seconds from the first step) and its run folder."""
    root = Path(options.runs) / preset
    command = [
        sys.executable, "train.py", "fit", "--config=configs/mlm.yaml", *PRESETS[preset][1],
        "--config=configs/size/mini.yaml", f"--data.train_files={options.train}", f"--data.val_files={options.val}",
        f"--data.vocab_size={VOCABULARY}", f"--data.max_length={LENGTH}", f"--data.batch_size={BATCH}",
        f"--trainer.max_steps={options.steps}", f"--trainer.val_check_interval={options.every}",
        f"--trainer.default_root_dir={root}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    run = max((root / "mlm").iterdir(), key=lambda folder: int(folder.name.split("_")[1]))
    return read_curve(run), run


def read_curve(run: Path) -> Curve:
    """Return step, validation loss and seconds since the end of the validation before step 1."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars("val/loss")
    return [(event.step, event.value, event.wall_time - events[0].wall_time) for event in events]


def train_peer(options: argparse.Namespace, tokenizer: Path) -> Curve:
    """Train the Trainer on the same text with the same tokenizer."""
    out = Path(options.runs) / "peer.json"
    subprocess.run(
        [sys.executable, "benchmarks/peer.py", f"--tokenizer={tokenizer}", f"--train={options.train}",
         f"--val={options.val}", f"--out={out}", f"--steps={options.steps}", f"--eval-every={options.every}",
         "--bf16", "--lr=1e-3", "--warmup=200"],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return [tuple(point) for point in json.loads(out.read_text())["curve"]]


def passed(curve: Curve, loss: float) -> tuple[int, float] | None:
    """Return step and seconds of the first validation below `loss`."""
    return next(((step, seconds) for step, value, seconds in curve if value < loss and seconds is not None), None)


def draw(curves: dict[str, Curve]) -> None:
    """Draw validation loss against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, curve in curves.items():
        axes.plot([step * BATCH * LENGTH / 1e6 for step, *_ in curve], [loss for _, loss, _ in curve], label=name)
    axes.set(xlabel="million tokens", ylabel="validation loss (nats)", ylim=(3.5, 8))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=120)


def body(curves: dict[str, Curve], unigram: float) -> str:
    """Return tables and text of the section."""
    steps = sorted({step for curve in curves.values() for step, *_ in curve if step % 400 == 0 and step})
    rows = [
        [f"{step:,}", *(next((f"{loss:.2f}" for at, loss, _ in curve if at == step), "") for curve in curves.values())]
        for step in steps
    ]
    peer_loss, peer_seconds = curves["Trainer"][-1][1:]
    summary = []
    for name, curve in curves.items():
        reached = passed(curve, peer_loss) if name != "Trainer" else None
        when = f"step {reached[0]}, {reached[1]:.0f} s, 1/{peer_seconds / reached[1]:.0f}" if reached else ""
        summary.append([name, f"{curve[-1][1]:.2f}", f"{curve[-1][2]:,.0f}", when])
    header = ["", "final loss", "seconds", f"passes the Trainer's {peer_loss:.2f} at (fraction of the Trainer's time)"]
    return (
        f"{table(header, summary)}\n\n![validation loss against tokens]({FIGURE.name})\n\n"
        f"{table(['step', *curves], rows)}\n\n"
        f"Unigram counts of the training text: {unigram:.2f} on the same targets. Validation always masks 15 %, the "
        "same positions for both presets; its time is in the seconds. The Trainer's curve was measured once on "
        "another day (`--peer` measures it anew); it never leaves the plateau just below unigram counts."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--every", type=int, default=200, help="steps between validations")
    parser.add_argument("--runs", default="runs/quality")
    parser.add_argument("--peer", action="store_true", help="measure the Trainer too")
    parser.add_argument("--read", action="store_true", help="read finished runs, train nothing")
    options = parser.parse_args()
    options.runs = str(Path(options.runs).absolute())
    curves: dict[str, Curve] = {}
    for preset in options.presets:
        if options.read:
            runs = (Path(options.runs) / preset / "mlm").iterdir()
            run = max(runs, key=lambda folder: int(folder.name.split("_")[1]))
            curves[PRESETS[preset][0]] = read_curve(run)
        else:
            curves[PRESETS[preset][0]], run = train(preset, options)
    curves["Trainer"] = train_peer(options, run / "tokenizer") if options.peer else list(PEER)
    unigram = json.loads((run / "summary.json").read_text())["metrics"]["val/unigram_loss"]
    draw(curves)
    write_section("quality", "Learning: validation loss of mini", body(curves, unigram))


if __name__ == "__main__":
    main()
