"""Predicted against measured memory.

    python benchmarks/plan.py                 # peak of live tensors, 54 configurations, 10 minutes on 2 cores
    python benchmarks/plan.py --budgets       # ten budgets for base and large, 40 minutes on one core
    python benchmarks/plan.py --time          # wall time of 200 steps of mini and small, 10 minutes
    python benchmarks/plan.py --search        # what a plan takes for large and for ten billion parameters, 2 minutes
    python benchmarks/plan.py --fit-profile runs/mlm/version_0 runs/mlm/version_1   # of the CUDA device they ran on

The prediction is that of `train.py plan`. The measurement is torch's profiler, which hears of every allocation and free
from the allocator itself, around the second step and the last validation of `train.py fit`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.cli.options import Options
from leanbert.measure.trace import live_tensors
from leanbert.memory.precision import has_16_bit_products
from leanbert.planning.predict import Prediction, predict
from leanbert.planning.profile import FOLDER
from leanbert.units import MIB
from plan_logs import write_fitted
from plan_runs import budget_section, search_section, time_section
from report import table, write_section

ROOT = Path(__file__).parents[1]
PLAIN = (
    "trainer: {precision: 32-true, callbacks: []}\nmodel: {init_args: {optimizer: {name: adamw, lr: 0.001}}}\n"
    "data: {init_args: {vocab_size: 8192}}\n"
)
SIZES = {  # layers, hidden, heads
    "tiny": (2, 128, 2),
    "odd": (5, 192, 3),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "deep": (9, 128, 2),
    "base": (12, 768, 12),
}


SIXTEEN_BITS = {"bf16_mixed", "bf16_true", "lean"}


@dataclass(frozen=True)
class Case:
    """One configuration of the grid."""

    size: str
    rows: int
    length: int
    overlays: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    task: str = "mlm"

    @property
    def name(self) -> str:
        """What is in the table."""
        own = [] if self.task == "mlm" else [self.task]
        return " + ".join([*own, *self.overlays, *(word.split(".")[-1] for word in self.more)]) or "plain"


def grid() -> list[Case]:
    """Return the configurations; without 16-bit matrix products, large ones in 16 bits would take hours."""
    single = [
        "accumulation", "chunked_head", "selective_checkpointing", "checkpointing", "layer_major", "offload",
        "optimizer_in_backward", "return_pages", "bf16_mixed", "bf16_true", "adamw_8bit", "adamw_4bit", "adama",
        "adafactor", "pruning", "structured_pruning", "lean",
    ]  # fmt: skip
    bert, muon = "--model.encoder.preset=bert", "--model.optimizer.name=muon"
    cases = [Case("tiny", 16, 128), *(Case("tiny", 16, 128, (name,)) for name in single)]
    cases += [Case("tiny", 16, 128, names, (bert,)) for names in ((), ("checkpointing",), ("bf16_mixed",))]
    cases += [
        Case("mini", 13, 100),
        Case("mini", 13, 100, ("bf16_mixed", "checkpointing")),
        Case("mini", 24, 128, ("accumulation", "adamw_8bit")),
        Case("mini", 7, 333, ("layer_major",)),
        Case("mini", 9, 256, (), (muon,)),
        Case("mini", 32, 128, ("bf16_mixed",)),
        Case("mini", 33, 64, ("accumulation", "bf16_true", "chunked_head")),
        Case("mini", 11, 512, ("selective_checkpointing", "offload")),
        Case("odd", 7, 97),
        Case("odd", 21, 77, ("accumulation", "checkpointing")),
        Case("odd", 21, 77, ("layer_major", "optimizer_in_backward")),
        Case("odd", 21, 77, ("layer_major", "optimizer_in_backward", "adamw_4bit", "bf16_mixed")),
        Case("odd", 9, 150, ("checkpointing", "chunked_head", "adafactor")),
        Case("odd", 9, 150, ("bf16_true", "adamw_8bit", "selective_checkpointing")),
        Case("odd", 19, 64, ("accumulation", "bf16_mixed", "selective_checkpointing"), (bert,)),
        Case("deep", 17, 90),
        Case("deep", 17, 90, ("lean",)),
        Case("deep", 17, 90, ("accumulation", "bf16_mixed", "checkpointing", "adamw_4bit")),
        Case("deep", 20, 120, ("pruning", "accumulation"), (bert,)),
        Case("small", 6, 128),
        Case("small", 10, 128, ("bf16_mixed", "checkpointing")),
        Case("small", 10, 128, ("lean",)),
        Case("small", 12, 64, ("adama",)),
        Case("base", 4, 128),
        Case("base", 4, 128, ("bf16_mixed", "checkpointing", "adamw_8bit")),
        Case("base", 4, 128, ("lean",)),
        Case("mini", 11, 96, task="srl"),
        Case("mini", 11, 96, ("accumulation", "checkpointing"), task="srl"),
        Case("mini", 9, 120, task="classification"),
        Case("mini", 9, 120, ("layer_major", "optimizer_in_backward"), task="classification"),
        Case("odd", 10, 64, task="translation"),
        Case("odd", 10, 64, ("checkpointing", "chunked_head", "adamw_8bit"), task="translation"),
        Case("mini", 12, 160, ("accumulation", "selective_checkpointing"), task="summarization"),
    ]
    if has_16_bit_products("cpu"):
        return cases
    return [case for case in cases if case.size not in ("small", "base") or not SIXTEEN_BITS & set(case.overlays)]


class ProfiledPeak(Callback):
    """Hear of every allocation in the second step and in the last validation batch."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._profile: Any = None
        self._before = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Begin with the second step."""
        if trainer.global_step == 1:
            self._begin()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self._end()

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        """Begin with the validation after the last step."""
        if trainer.global_step == 2:
            self._begin()

    def on_validation_batch_end(self, *_: Any) -> None:
        """End."""
        self._end()

    def _begin(self) -> None:
        gc.collect()
        self._before = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in live_tensors()}.values())
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def _end(self) -> None:
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.__exit__(None, None, None)
        events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = self._before
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            self.peak_bytes = max(self.peak_bytes, live)


class Predicting(CLI):
    """`plan` that keeps the prediction of the given configuration."""

    prediction: Prediction

    def plan(self, options: Options) -> None:
        """Predict."""
        self.prediction = predict(self.run_settings())


class Measuring(CLI):
    """`fit` with the profiler."""

    def _callbacks(self) -> list[Any]:
        self.profiled = ProfiledPeak()
        return [*super()._callbacks(), self.profiled]


def arguments_of(case: Case, root: Path) -> list[str]:
    """Return the arguments after the subcommand."""
    layers, hidden, heads = SIZES[case.size]
    plain = root / "plain.yaml"
    plain.write_text(PLAIN)
    return [
        f"--config=configs/{case.task}.yaml", f"--config={plain}",
        *(f"--config=configs/memory/{name}.yaml" for name in case.overlays),
        f"--model.encoder.num_layers={layers}", f"--model.encoder.hidden_size={hidden}",
        f"--model.encoder.num_heads={heads}", f"--data.max_length={case.length}", f"--data.batch_size={case.rows}",
        "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={root}", *case.more,
    ]  # fmt: skip


def live_section(root: Path, figure: Path) -> str:
    """Run the grid; return its table, and draw the figure."""
    quiet_libraries()
    rows, pairs = [], []
    for case in grid():
        with contextlib.redirect_stderr(io.StringIO()):
            gc.collect()
            before = sum(tensor.untyped_storage().nbytes() for tensor in live_tensors())
            start = time.perf_counter()
            predicted = Predicting(["plan", *arguments_of(case, root)]).prediction
            seconds = time.perf_counter() - start
            measured = Measuring(["fit", *arguments_of(case, root)]).profiled.peak_bytes - before
        error = predicted.peak_bytes / measured - 1
        pairs.append((measured, predicted.peak_bytes))
        cells = [case.size, f"{case.rows} x {case.length}", case.name, f"{predicted.peak_bytes / MIB:,.2f}"]
        rows.append([*cells, f"{measured / MIB:,.2f}", f"{error:+.2%}", f"{seconds:.1f}"])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    errors = [abs(predicted / measured - 1) for measured, predicted in pairs]
    draw(pairs, figure)
    header = ["", "sequences x tokens", "techniques", "predicted MiB", "measured MiB", "error", "s to predict"]
    text = f"{len(errors)} configurations: median error {statistics.median(errors):.2%}, largest {max(errors):.2%}."
    return f"{text}\n\n![Predicted against measured]({figure.name})\n\n{table(header, rows)}"


def draw(pairs: list[tuple[int, int]], path: Path) -> None:
    """Draw predicted against measured peaks, in MiB, on logarithmic axes."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    measured, predicted = ([value / MIB for value in values] for values in zip(*pairs, strict=True))
    bounds = [min(measured) / 1.3, max(measured) * 1.3]
    axes.plot(bounds, bounds, color="0.7", linewidth=1, zorder=0)
    axes.scatter(measured, predicted, s=18)
    axes.set(xscale="log", yscale="log", xlim=bounds, ylim=bounds, xlabel="measured peak of live tensors, MiB")
    axes.set_ylabel("predicted before anything is allocated, MiB")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", action="store_true", help="fit --budget for base and large instead")
    parser.add_argument("--time", action="store_true", help="wall time that plan --measure foretells instead")
    parser.add_argument("--search", action="store_true", help="time and memory of the plan itself instead")
    parser.add_argument("--fit-profile", nargs="+", type=Path, metavar="RUN", help="folders of runs on one device")
    parser.add_argument(
        "--output", type=Path, default=FOLDER, help="folder of its profile (default: that of the package)"
    )
    options = parser.parse_args()
    if options.fit_profile:
        path = write_fitted(options.fit_profile, options.output)
        print(f"{path}\n{path.read_text()}")
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.budgets:
            write_section("plan-budgets", "Budgets kept on a CPU", budget_section(Path(folder)))
        elif options.time:
            write_section("plan-time", "Wall time foretold", time_section(Path(folder)))
        elif options.search:
            write_section("plan-search", "What a plan takes", search_section(Path(folder)))
        else:
            text = live_section(Path(folder), ROOT / "docs" / "plan.png")
            write_section("plan", "Predicted against measured memory", text)


if __name__ == "__main__":
    main()
