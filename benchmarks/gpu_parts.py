"""The parts of `benchmarks/gpu.py`: each yields the rows of its table one by one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpu_fits import Run, held_bytes, measured_fit, predicted, watched_fit
from gpu_watchers import GradientKeeper, Synchronisations
from leanbert.callbacks.reporting.plan import error_percent
from leanbert.planning.device import target_of
from leanbert.tasks.techniques import TECHNIQUES, Techniques
from leanbert.units import MIB, format_size
from plan import Case
from plan_runs import name, version
from report import hardware
from speed import MASK_RATE, fit_command, matmul_flops, run_leanbert, run_peer
from speed import SIZES as SPEED_SIZES

ROOT = Path(__file__).parents[1]
PEAK_BF16 = {"H100 PCIe": 756e12, "H100 80GB HBM3": 989e12, "H200": 989e12}
"""Dense peaks of bf16 products in FLOP/s by part of the card's name; NVIDIA's data sheets of H100 and H200."""
NEEDED = ("torch", "lightning", "jsonargparse", "transformers", "accelerate", "tokenizers", "torchmetrics", "pytest")
NOTHING_ALONE = ("oom_recovery", "return_pages", "movement_pruning")
"""Techniques that lower nothing alone on a GPU, or need another one."""
TOGETHER = 7
"""Runs with a budget at a time: a plan takes one core for many seconds."""


def card(run: Run) -> Iterator[list[str]]:
    """Yield what is here, and what its products reach."""
    yield ["hardware", hardware()]
    for package in NEEDED:
        try:
            yield [package, metadata.version(package)]
        except metadata.PackageNotFoundError:
            yield [package, "missing"]
    if not run.dry:
        properties = torch.cuda.get_device_properties(0)
        yield [
            "memory",
            f"{format_size(properties.total_memory)}, compute capability {properties.major}.{properties.minor}",
        ]
        torch.zeros(1, device="cuda")
        yield ["CUDA context", format_size(held_bytes(run))]
    size = 512 if run.dry else 8192
    yield ["products in bf16", f"{matmul_flops(torch.bfloat16, size) / 1e12:,.1f} TFLOP/s of {size} x {size} matrices"]
    known = peak_flops()
    yield ["their peak", "unknown" if known is None else f"{known / 1e12:,.0f} TFLOP/s"]


def peak_flops() -> float | None:
    """Return the known dense peak of this card in bf16; None: it is not known."""
    if not torch.cuda.is_available():
        return None
    named = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_BF16.items() if part in named), None)


def synchronisations(run: Run) -> Iterator[list[str]]:
    """Yield for what the host waits in steps of two tasks."""
    for task in ("mlm", "srl"):
        found = Synchronisations(run.device)
        size, overlays = ("tiny", ()) if run.dry else ("mini", ("bf16_mixed",))
        case = Case(size, 16, 64, overlays, ("--trainer.log_every_n_steps=100",), task)
        watched_fit(run.arguments(case, steps=found.last + 2), found)
        places = Counter(found.places).most_common()
        yield [task, str(len(found.places)), ", ".join(f"{place} ({count})" for place, count in places)]


def tests(run: Run) -> Iterator[list[str]]:
    """Yield the tests of `pytest -m cuda` as they end, those that did not pass with the reason, and the count."""
    words = ["-m", "cuda", "-n", "0", "-vv", "--tb=line", "-p", "no:cacheprovider", "tests/cuda"]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in map(str.strip, process.stdout):
            if found := re.match(r"tests/cuda/(\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
                yield [found[1], found[2].lower()]
            elif re.match(r"/\S+:\d+: ", line):
                yield ["", in_cell(line)]
            elif re.search(r"\d+ (passed|failed|skipped|error)", line):
                yield ["all", line.strip("= ")]


def in_cell(text: str) -> str:
    """Return the last line of a text, such as an error, for a cell of a table."""
    return (text.strip().splitlines() or [""])[-1].replace("|", "/")


def equality(run: Run) -> Iterator[list[str]]:
    """Yield losses and gradients of three steps in float32 on the CPU and on the device, from the same weights."""
    for task in ("mlm", "srl"):
        root = run.folder / f"equality-{task}"
        root.mkdir()
        case = Case("tiny" if run.dry else "mini", 16, 64, (), ("--model.optimizer.lr=0",), task)
        first = run.arguments(case, f"--trainer.default_root_dir={root}", "--trainer.accelerator=cpu", steps=1)
        watched_fit(first)  # weights are drawn on the device, and each device draws others
        start = f"--model.init_from={next(root.rglob('step-*.ckpt'))}"
        kept = []
        for device in ("cpu", run.device):
            kept.append(GradientKeeper())
            watched_fit(run.arguments(case, f"--trainer.accelerator={device}", start, steps=3), kept[-1])
        for step, ((loss, gradients), (other, others)) in enumerate(zip(kept[0].steps, kept[1].steps, strict=True)):
            worst = max(
                float((others[name] - gradient).norm() / gradient.norm().clamp(min=1e-12))
                for name, gradient in gradients.items()
            )
            yield [task, str(step + 1), f"{loss:.6f}", f"{other:.6f}", f"{other - loss:+.1e}", f"{worst:.1e}"]


def failure(error: Exception) -> str:
    """Return the kind and the first line of an error for a cell of a table."""
    return in_cell(f"{type(error).__name__}: {error}".partition("\n")[0])


# ---- memory


def budgets(run: Run) -> Iterator[list[str]]:
    """Yield what runs with budgets needed, from loose to tight."""
    shares = [1.1] if run.dry else [0.8, 0.6, 0.45, 0.35, 0.28]
    cases = [Case("tiny", 16, 64)] if run.dry else [Case("base", 64, 128), Case("large", 32, 128)]
    context = 0 if run.dry else held_bytes(run)
    target = target_of(run.device)  # type: ignore[arg-type]
    jobs = []
    for case in cases:
        arguments = run.arguments(case, "--trainer.log_every_n_steps=1", steps=3)
        given = target.needs(predicted(arguments, run.device).peak_bytes, Techniques())
        jobs += [(case, round(share * given), arguments) for share in shares]
    with ThreadPoolExecutor(TOGETHER) as pool:
        yield from pool.map(lambda job: budget_row(run, context, *job), jobs)


def budget_row(run: Run, context: int, case: Case, budget: int, arguments: list[str]) -> list[str]:
    """Return the row of one run with a budget, in a process of its own."""
    folder = run.folder / f"budget-{case.size}-{budget}"
    words = ["train.py", "fit", *arguments, f"--budget={budget // MIB}MiB", f"--trainer.default_root_dir={folder}"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    cells = [case.size, f"{budget / MIB:,.0f}"]
    if done.returncode:
        return [*cells, in_cell(done.stderr) or f"exit code {done.returncode}", "", "", "NO"]
    plan = json.loads((version(folder) / "plan.json").read_text())
    summary = json.loads((version(folder) / "summary.json").read_text())
    Path(summary["checkpoint"]).unlink(missing_ok=True)
    held = summary["peak_rss_bytes"] if run.dry else context + highest(version(folder), "memory/reserved_mib") * MIB
    chosen = next(candidate for candidate in plan["candidates"] if candidate["fits"])
    kept = held <= budget and summary["steps"] == 3
    foretold = f"{chosen['predicted_needs_bytes'] / MIB:,.0f}"
    return [*cells, name(chosen), foretold, f"{held / MIB:,.0f}", "yes" if kept else "NO"]


def highest(folder: Path, tag: str) -> float:
    """Return the highest value that a run has logged."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return max(event.value for event in events.Scalars(tag))


def cases(run: Run) -> list[Case]:
    """Return the configurations of which the plan is compared with the allocator."""
    bert, muon = "--model.encoder.preset=bert", "--model.optimizer.name=muon"
    if run.dry:
        return [Case("tiny", 8, 64), Case("tiny", 8, 64, ("checkpointing",), task="srl")]
    return [
        Case("mini", 64, 128, ("accumulation",), (muon,)),
        Case("small", 64, 128, ("bf16_mixed",), (bert,)),
        Case("small", 64, 128, ("bf16_mixed",), task="srl"),
        Case("small", 32, 128, ("bf16_mixed",), task="translation"),
        Case("base", 64, 128),
        Case("base", 64, 128, ("bf16_mixed",)),
        Case("base", 64, 128, ("bf16_mixed", "checkpointing")),
        Case("base", 64, 128, ("bf16_true", "adamw_8bit")),
        Case("base", 64, 128, ("lean",)),
        Case("base", 16, 512, ("bf16_mixed",)),
        Case("base", 16, 512, ("bf16_mixed", "layer_major", "optimizer_in_backward")),
        Case("large", 16, 512, ("bf16_mixed", "selective_checkpointing")),
    ]


def plan(run: Run) -> Iterator[list[str]]:
    """Yield predicted and allocated peaks."""
    for case in cases(run):
        arguments = run.arguments(case)
        foretold = predicted(arguments, run.device).peak_bytes
        try:
            found = measured_fit(run, arguments).peak_bytes
        except Exception as error:  # of one configuration: the others are still to come
            yield [case.size, f"{case.rows} x {case.length}", case.name, f"{foretold / MIB:,.1f}", failure(error), ""]
            continue
        sizes = [f"{size / MIB:,.1f}" for size in (foretold, found)]
        error = f"{error_percent(foretold, found):+.1f} %"
        yield [case.size, f"{case.rows} x {case.length}", case.name, *sizes, error]


def memory(run: Run) -> Iterator[list[str]]:
    """Yield peak and time of each technique at base."""
    every = [technique.name for technique in TECHNIQUES if technique.name not in NOTHING_ALONE]
    chosen = ["checkpointing", "adamw_8bit"] if run.dry else every
    plain = None
    for overlays in [(), *((technique,) for technique in chosen)]:
        case = Case("tiny", 8, 64, overlays) if run.dry else Case("base", 32, 128, overlays)
        try:
            found = measured_fit(run, run.arguments(case, steps=2 if run.dry else 8))
        except Exception as error:  # of one technique: the others are still to come
            yield [case.name, failure(error), "", "", "", ""]
            continue
        plain = plain or found
        ratios = [f"{found.peak_bytes / plain.peak_bytes:.2f}", f"{found.step_seconds / plain.step_seconds:.2f}"]
        yield [
            case.name, f"{found.peak_bytes / MIB:,.0f}", ratios[0], f"{1000 * found.step_seconds:,.1f}", ratios[1],
            f"{found.loss:.3f}",
        ]  # fmt: skip


# ---- speed


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
    batch, length = SPEED_SIZES[size][3:5]
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
