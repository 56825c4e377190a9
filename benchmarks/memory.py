"""What each memory technique saves and what it costs, each relative to plain float32 AdamW on the same batches.

    python benchmarks/memory.py                                       # bytes and time, 30 minutes on 2 cores
    python benchmarks/memory.py --large                               # BERT-large in 2 GiB, 30 minutes
    python benchmarks/memory.py --learning --train train.txt.gz --val val.txt.gz   # validation loss after 600 steps
    python benchmarks/memory.py --learning ... --start CHECKPOINT     # all rows from one model, past the first plateau

Every row is a process of its own: `train.py fit` with `configs/memory/NAME.yaml`, embedded text, sequences of 128.
Live bytes are the peak of tensor bytes in one step, as the memory monitor traces it; resident memory is the peak of the
whole process; the time of a step is the median of those after the traced one. On a processor without 16-bit matrix
products, where such a step takes many minutes, the bytes of 16-bit rows are those that `plan` predicts, and marked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.callbacks.reporting.memory_monitor import MemoryMonitor
from leanbert.cli.app import CLI, quiet_libraries
from leanbert.data.batches.batch import IGNORED, MLMBatch
from leanbert.errors import UserError
from leanbert.measure.trace import LiveBytes
from leanbert.memory.precision import has_16_bit_products
from leanbert.memory.step import optimizer_step
from leanbert.models.config import EncoderConfig
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.packed_inputs import PackedInputs
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.pretrained.build import build_model
from leanbert.tasks.techniques import TECHNIQUES
from leanbert.units import MIB
from plan import SIXTEEN_BITS, Predicting
from report import table, write_section

ROOT = Path(__file__).parents[1]
LEARNING_RATE = 1e-3
PLAIN = f"trainer: {{precision: 32-true}}\nmodel: {{init_args: {{optimizer: {{name: adamw, lr: {LEARNING_RATE}}}}}}}\n"
SIZES = {  # layers, hidden, heads, sequences a step, vocabulary, steps
    "tiny": (2, 128, 2, 16, 8_192, 5),
    "mini": (4, 256, 4, 32, 16_384, 6),
    "base": (12, 768, 12, 12, 30_522, 3),
}
LENGTH = 128
LEARNING_ROWS, LEARNING_LENGTH = 16, 64  # sequences a step of --learning, and their tokens
LEFT_OUT = ("oom_recovery", "fp16_mixed", "offload_host", "pruning_2_4", "movement_pruning")
"""They need an accelerator, or lower nothing alone."""
KINDS = {
    technique.name: "exact" if technique.exact else "approximate"
    for technique in TECHNIQUES
    if technique.name not in LEFT_OUT
}
NOTES = (
    "Bytes are exact and repeatable. `optimizer_in_backward` lowers nothing alone where the peak is at the begin of "
    "the backward pass: with `checkpointing`, where it is at the end, it takes the gradients away. Of two overlays "
    "that set the optimizer the later one counts. predicted: this processor has no 16-bit matrix products, a step "
    "would take minutes."
)
Result = dict[str, Any]


def arguments_of(root: Path, size: str, overlays: tuple[str, ...]) -> list[str]:
    """Return the arguments of `fit`."""
    layers, hidden, heads, rows, vocabulary, steps = SIZES[size]
    plain = root / "plain.yaml"
    plain.write_text(PLAIN)
    return [
        "fit", "--config=configs/mlm.yaml", f"--config={plain}",
        *(f"--config=configs/memory/{name}.yaml" for name in overlays),
        f"--model.encoder.num_layers={layers}", f"--model.encoder.hidden_size={hidden}",
        f"--model.encoder.num_heads={heads}", f"--data.max_length={LENGTH}", f"--data.batch_size={rows}",
        f"--data.vocab_size={vocabulary}", f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=1",
        "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={root}",
    ]  # fmt: skip


def train(root: Path, size: str, overlays: tuple[str, ...], *arguments: str) -> Result:
    """Train in a process of its own; return its summary with the median time of a step."""
    command = [sys.executable, "train.py", *arguments_of(root, size, overlays), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(overlays) or 'plain'}: {done.stderr[-2000:]}")
    run = max((root / "mlm").iterdir(), key=lambda folder: int(folder.name.split("_")[1]))
    summary = json.loads((run / "summary.json").read_text())
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    speeds = [event.value for event in events.Scalars("train/tokens_per_second") if event.step > 2]
    tokens = SIZES[size][3] * LENGTH
    summary["step_seconds"] = tokens / statistics.median(speeds) if speeds else float("nan")
    return summary


def planned(root: Path, size: str, overlays: tuple[str, ...]) -> Result:
    """Return what `plan` predicts, in the form of a summary; a time and a loss are not in it."""
    answer = root / "plan.json"
    command = [sys.executable, "train.py", "plan", *arguments_of(root, size, overlays)[1:], f"--json={answer}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"plan of {' '.join(overlays)}: {done.stderr[-2000:]}")
    plan = json.loads(answer.read_text())
    return {
        "peak_bytes": plan["predicted_peak_bytes"],
        "by_category": plan["by_category"],
        "peak_rss_bytes": plan["predicted_rss_bytes"],
    }


def peak_here(root: Path, overlays: tuple[str, ...]) -> int:
    """Train tiny in this process, which is quick; return its peak of live bytes, "other" left out.

    Raises UserError if the techniques cannot combine.
    """
    quick = ["--trainer.limit_val_batches=0", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]
    with contextlib.redirect_stderr(io.StringIO()):
        cli = CLI([*arguments_of(root, "tiny", overlays), *quick])
    callbacks: list[Any] = cli.trainer.callbacks
    parts = next(callback for callback in callbacks if isinstance(callback, MemoryMonitor)).summary()["by_category"]
    return sum(size for name, size in parts.items() if name != "other")  # other: what earlier runs have left behind


def planned_here(root: Path, overlays: tuple[str, ...]) -> int:
    """Return what `peak_here` would measure, as it is predicted."""
    parts = Predicting(["plan", *arguments_of(root, "tiny", overlays)[1:]]).prediction.by_category
    return sum(size for name, size in parts.items() if name != "other")


def ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}"


def bytes_and_time(root: Path, size: str) -> str:
    """Return the table of one size."""
    results = {}
    for name in ["plain", *KINDS]:
        overlays = () if name == "plain" else (name,)
        if name in SIXTEEN_BITS and not has_16_bit_products("cpu"):
            result = planned(root, size, overlays)
        else:
            result = train(root, size, overlays)
        results[name] = result
        peak, seconds = result["peak_bytes"] / MIB, result.get("step_seconds", float("nan"))
        print(f"{size}: {name}: {peak:,.0f} MiB live, {seconds:.2f} s a step", file=sys.stderr, flush=True)
    plain = results["plain"]
    rows = []
    for name, result in results.items():
        categories = [f"{result['by_category'][part] / MIB:,.0f}" for part in CATEGORIES]
        kind = KINDS.get(name, "")
        measured = ["predicted", "", ""]
        if "step_seconds" in result:
            times = ratio(result["step_seconds"], plain["step_seconds"])
            measured = [f"{result['step_seconds']:.2f}", times, f"{result['metrics']['train/loss']:.3f}"]
        rows.append(
            [
                name, kind, f"{result['peak_bytes'] / MIB:,.0f}", ratio(result["peak_bytes"], plain["peak_bytes"]),
                *categories, f"{result['peak_rss_bytes'] / MIB:,.0f}", *measured,
            ]
        )  # fmt: skip
    layers, hidden, _, batch, vocabulary, steps = SIZES[size]
    header = ["", "", "live MiB", "x plain", *CATEGORIES, "RSS MiB", "s a step", "x plain", f"loss, step {steps}"]
    title = f"**{size}**: {layers} x {hidden}, vocabulary {vocabulary:,}, {batch} x {LENGTH} tokens a step"
    return f"{title}\n\n{table(header, rows)}"


def large(root: Path) -> str:
    """Return what BERT-large takes with `lean`, measured, and without, predicted: it would not fit here."""
    arguments = ["--config=configs/mlm.yaml", "--config=configs/size/large.yaml", "--config=configs/memory/lean.yaml",
                 "--data.vocab_size=30522", "--model.encoder.vocab_size=30522", "--data.max_length=512",
                 "--data.batch_size=32", "--trainer.max_steps=2",
                 "--trainer.limit_val_batches=8", f"--trainer.default_root_dir={root}"]  # fmt: skip
    subprocess.run([sys.executable, "train.py", "fit", *arguments], cwd=ROOT, check=True)
    summary = json.loads((root / "mlm" / "version_0" / "summary.json").read_text())
    plain, rss = predict_plain(), summary["peak_rss_bytes"]
    rows = [
        ["plain float32 AdamW", f"{plain / MIB:,.0f} (predicted)", "", "1.00"],
        ["`lean`", f"{summary['peak_bytes'] / MIB:,.0f}", f"{rss / MIB:,.0f}", f"{rss / plain:.3f}"],
    ]
    text = (
        "**BERT-large** (24 x 1024), 32 x 512 tokens a step: two steps, two validations, one checkpoint, from the start"
    )
    seconds = f"{summary['seconds'] / summary['steps']:,.0f} s a step."
    return f"{text}. {seconds}\n\n{table(['', 'live MiB', 'RSS MiB', 'RSS against plain live'], rows)}"


def predict_plain() -> int:
    """Return the peak live bytes of one step of BERT-large in float32 with AdamW, traced on tensors without memory."""
    rows, length = 32, 512
    with FakeTensorMode():
        model = build_model(EncoderConfig(num_layers=24, hidden_size=1024, num_heads=16), 30_522)
        optimizer = build_optimizer(model, OptimizerConfig(name="adamw"))
        shapes = [(rows, length)] * 3 + [(rows, round(0.2 * length))] * 2
        *inputs, index, targets = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
        batch = MLMBatch(PackedInputs(*inputs), index, targets)
        optimizer_step(_Task(model), batch, optimizer)  # makes the optimizer's state
        with LiveBytes(model, [optimizer]) as trace:
            optimizer_step(_Task(model), batch, optimizer)
    return trace.timeline().peak_bytes


class _Task:
    def __init__(self, model: MaskedLanguageModel) -> None:
        self.model = model

    def count_targets(self, batch: MLMBatch) -> torch.Tensor:
        return (batch.targets != IGNORED).sum()

    def loss_sum(self, batch: MLMBatch) -> torch.Tensor:
        return self.model.loss_sum(batch.inputs, batch.target_index, batch.targets)


CATEGORIES = ["parameters", "gradients", "optimizer", "activations", "other"]


def pairs(root: Path) -> str:
    """Return the peak live bytes of every pair that can be combined, relative to plain, on tiny."""
    names = [name for name in KINDS if name not in ("lean", "return_pages", "pruning", "structured_pruning")]
    quiet_libraries()
    plain, products = peak_here(root, ()), has_16_bit_products("cpu")
    cells: dict[tuple[str, str], str] = {}
    for pair in itertools.combinations(names, 2):
        find = peak_here if products or not SIXTEEN_BITS & set(pair) else planned_here
        try:
            cells[pair] = ratio(find(root, pair), plain)
        except UserError:
            cells[pair] = "-"
    rows = [[row, *(cells.get((row, column), "") for column in names[1:])] for row in names[:-1]]
    title = (
        "Pairs on tiny (2 x 128, vocabulary 8,192, 16 x 128 tokens), peak live bytes without other, relative to plain"
    )
    note = "" if products else ", with 16 bits predicted"
    return f"{title}{note}; -: cannot combine.\n\n{table(['', *names[1:]], rows)}"


def learning(root: Path, options: argparse.Namespace) -> str:
    """Return validation losses of mini after `--steps`, same seed and batches."""
    names = options.techniques or ["plain", *KINDS]
    losses = {}
    for name in names:
        print(f"learning: {name}", file=sys.stderr, flush=True)
        result = train(
            root, "mini", () if name == "plain" else (name,), f"--data.train_files={options.train}",
            f"--data.val_files={options.val}", f"--data.batch_size={LEARNING_ROWS}",
            f"--data.max_length={LEARNING_LENGTH}", f"--trainer.max_steps={options.steps}",
            "--trainer.limit_val_batches=0.5", f"--trainer.val_check_interval={options.steps}",
            "--trainer.log_every_n_steps=50",
            *([f"--model.init_from={options.start}"] if options.start else []),
        )  # fmt: skip
        losses[name] = result["metrics"]["val/loss"]
        print(f"  {losses[name]:.4f}", file=sys.stderr, flush=True)
    rows = [
        [name, KINDS.get(name, ""), f"{loss:.4f}",
         f"{loss - losses['plain']:+.4f}" if "plain" in losses else ""]
        for name, loss in losses.items()
    ]  # fmt: skip
    title = (
        f"mini, {LEARNING_ROWS} x {LEARNING_LENGTH} tokens a step, same seed and batches, learning rate {LEARNING_RATE}"
    )
    if options.start:
        title += ", all from one checkpoint"
    return f"{title}\n\n" + table(["", "", f"val/loss after {options.steps} steps", "against plain, nats"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["mini", "base"])
    parser.add_argument("--no-pairs", action="store_true", help="leave the pairs on tiny out")
    parser.add_argument("--large", action="store_true", help="BERT-large with lean instead, in two steps")
    parser.add_argument("--learning", action="store_true", help="compare validation losses instead")
    parser.add_argument("--train", help="training text of --learning")
    parser.add_argument("--val", help="validation text of --learning")
    parser.add_argument("--start", help="checkpoint that all rows of --learning begin with")
    parser.add_argument("--steps", type=int, default=600, help="steps of --learning")
    parser.add_argument("--techniques", nargs="*", help="rows of --learning (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.learning:
            if not (options.train and options.val):
                parser.error("--learning needs --train and --val")
            write_section("memory-learning", "Memory techniques: what they cost in learning", learning(root, options))
            return
        if options.large:
            write_section("memory-large", "BERT-large on a CPU in 2 GiB", large(root))
            return
        parts = [*(bytes_and_time(root, size) for size in options.sizes), NOTES]
        if not options.no_pairs:
            parts.append(pairs(root))
        write_section("memory", "Memory techniques: what they save and what they cost", "\n\n".join(parts))


if __name__ == "__main__":
    main()
