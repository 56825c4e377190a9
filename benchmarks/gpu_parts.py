"""The parts of `benchmarks/gpu.py`: each yields the rows of its table one by one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpu_fits import Run, held_bytes, in_cell, measured_fit, predicted, watched_fit
from gpu_speed import peak_flops
from gpu_watchers import GradientKeeper, Synchronisations
from leanbert.callbacks.reporting.plan import error_percent
from leanbert.errors import UserError
from leanbert.planning.device import target_of
from leanbert.planning.profile import read_profile
from leanbert.tasks.techniques import TECHNIQUES, Techniques
from leanbert.units import MIB, format_size
from plan import Case
from plan_logs import write_fitted
from plan_runs import name, version
from report import hardware
from speed import matmul_flops

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "lightning", "jsonargparse", "transformers", "accelerate", "tokenizers", "torchmetrics", "pytest")
NOTHING_ALONE = ("oom_recovery", "return_pages", "movement_pruning")
"""Techniques that lower nothing alone on a GPU, or need another one."""
OFFLOADED = ("--config=configs/strategy/fsdp_offload.yaml", "--trainer.devices=1")
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


def profile(run: Run) -> Iterator[list[str]]:
    """Yield the profile of the card, as `plan` reads it; of runs alone on it, in bf16."""
    monitor, folders = run.folder / "monitor.yaml", []
    monitor.write_text("trainer: {callbacks+: [{class_path: MemoryMonitor}]}\n")
    sizes = [Case("tiny", 8, 64)] if run.dry else [
        Case("base", 64, 128, ("bf16_mixed",)), Case("base", 256, 128, ("bf16_mixed",)),
        Case("large", 64, 128, ("bf16_mixed",)),
    ]  # fmt: skip
    for number, case in enumerate(sizes):
        root = run.folder / f"profile-{number}"
        more = [f"--config={monitor}", f"--trainer.default_root_dir={root}", "--trainer.log_every_n_steps=1"]
        words = ["train.py", "fit", *run.arguments(case, *more, steps=16), "--budget=auto"]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        folders.append(version(root))
    try:
        found = read_profile(write_fitted(folders, run.folder / "devices"))
    except UserError as error:  # a CPU has none
        yield ["none", in_cell(str(error))]
        return
    yield from ([key, str(value)] for key, value in asdict(found).items())
    yield ["file", f"`{json.dumps(asdict(found))}`"]


def memory(run: Run) -> Iterator[list[str]]:
    """Yield peak and time of each technique at base, and of shards in host memory, which a CPU has not apart."""
    every = [technique.name for technique in TECHNIQUES if technique.name not in NOTHING_ALONE]
    chosen = ["checkpointing", "adamw_8bit"] if run.dry else every
    sizes: tuple[str, int, int] = ("tiny", 8, 64) if run.dry else ("base", 32, 128)
    cases = [Case(*sizes, overlays) for overlays in [(), *((technique,) for technique in chosen)]]
    if not run.dry:  # the last: its process group stays
        cases.append(Case(*sizes, more=OFFLOADED))
    plain = None
    for case in cases:
        label = "fsdp_offload, one device" if case.more else case.name
        try:
            found = measured_fit(run, run.arguments(case, steps=2 if run.dry else 8))
        except Exception as error:  # of one technique: the others are still to come
            yield [label, failure(error), "", "", "", ""]
            continue
        plain = plain or found
        ratios = [f"{found.peak_bytes / plain.peak_bytes:.2f}", f"{found.step_seconds / plain.step_seconds:.2f}"]
        yield [
            label, f"{found.peak_bytes / MIB:,.0f}", ratios[0], f"{1000 * found.step_seconds:,.1f}", ratios[1],
            f"{found.loss:.3f}",
        ]  # fmt: skip
