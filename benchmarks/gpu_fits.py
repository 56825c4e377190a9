"""`fit` and `plan` in this process, for the parts of `benchmarks/gpu.py`: what a run took, on CUDA or on the CPU."""

from __future__ import annotations

import contextlib
import gc
import io
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.measure.counters import peak_rss_bytes
from leanbert.measure.trace import live_tensors
from leanbert.planning.predict import Prediction
from plan import Case, Predicting, ProfiledPeak, arguments_of

WORDS, DOCUMENT = 20_000, 4_000
"""Different words of the text, and how many a document has: nearly all rows hold one document, as the Trainer's do."""


@dataclass(frozen=True)
class Run:
    """One call of `benchmarks/gpu.py`: where it works, and whether it is dry (tiny, on the CPU)."""

    folder: Path
    dry: bool

    @property
    def device(self) -> str:
        """Kind of device that is measured."""
        return "cpu" if self.dry else "cuda"

    @property
    def common(self) -> list[str]:
        """Arguments of every fit."""
        device = f"--trainer.accelerator={self.device}"
        return [device, "--trainer.enable_progress_bar=false", f"--data.cache_dir={self.folder / 'cache'}"]

    def text(self) -> Path:
        """Return a text of made-up words, the frequent ones as frequent as in a language (Zipf)."""
        path = self.folder / "train.txt"
        if not path.is_file():
            chance, letters = random.Random(0), "aeioubcdfghklmnprstvw"
            words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(WORDS)]
            weights = [1 / (rank + 3) for rank in range(WORDS)]
            count = 20_000 if self.dry else 1_500_000
            drawn = chance.choices(words, weights, k=count)
            texts = [" ".join(drawn[start : start + DOCUMENT]) for start in range(0, count, DOCUMENT)]
            path.write_text("\n\n".join(texts) + "\n")
        return path

    def arguments(self, case: Case, *more: str, steps: int = 2) -> list[str]:
        """Return the arguments of a fit of a case, plain but for its overlays."""
        text = [f"--data.train_files={self.text()}"] if case.task == "mlm" else []
        if self.dry:
            text.append("--data.vocab_size=512")  # a small text gives no more, and the plan counts what is asked for
        return [*arguments_of(case, self.folder), *self.common, *text, f"--trainer.max_steps={steps}", *more]


@dataclass(frozen=True)
class Measured:
    """What a fit took: peak of tensors from its second step on, bytes, and seconds of a step; and the last loss."""

    peak_bytes: int
    step_seconds: float
    loss: float


class DevicePeak(Callback):
    """The allocator's peak on CUDA from the second step to the end, in the terms of `ProfiledPeak`."""

    peak_bytes = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Begin with the second step."""
        if trainer.global_step == 1:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()

    def on_train_end(self, *_: Any) -> None:
        """Read the peak."""
        self.peak_bytes = torch.cuda.max_memory_allocated()


class StepClock(Callback):
    """Seconds and loss of each step; the host waits for the device before and after."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        self._started = now()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Stop."""
        self.seconds.append(now() - self._started)
        self.losses.append(float(outputs["step_loss"]))


def now() -> float:
    """Return seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Watched(CLI):
    """`fit` with callbacks that look on."""

    def __init__(self, arguments: list[str], watchers: Sequence[Callback]) -> None:
        self.watchers = watchers
        super().__init__(arguments)

    def _callbacks(self) -> list[Any]:
        return [*super()._callbacks(), *self.watchers]


def watched_fit(arguments: list[str], *watchers: Callback) -> None:
    """Train in this process while `watchers` look on; what it says is not shown."""
    quiet_libraries()
    with contextlib.redirect_stderr(io.StringIO()):
        _Watched(["fit", *arguments], watchers)


def measured_fit(run: Run, arguments: list[str]) -> Measured:
    """Train in this process and return what it took."""
    gc.collect()
    if run.dry:
        before = sum(tensor.untyped_storage().nbytes() for tensor in live_tensors())
    else:
        torch.cuda.empty_cache()
        make_workspaces()
        before = torch.cuda.memory_allocated()
    peak: Any = ProfiledPeak() if run.dry else DevicePeak()
    clock = StepClock()
    watched_fit(arguments, peak, clock)
    seconds = statistics.median(clock.seconds[2:] or clock.seconds[-1:])
    return Measured(peak.peak_bytes - before, seconds, clock.losses[-1])


def make_workspaces() -> None:
    """Let cuBLAS take what it keeps from the allocator, in this thread and in that of backward passes.

    It is tens of MiB on Hopper, there from the first product on, and no tensor: `Target.base_bytes` has it in a plan.
    """
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.ones(256, 256, device="cuda", dtype=dtype, requires_grad=True)
        torch.nn.functional.linear(weight.detach(), weight, weight.detach()[0]).sum().backward()


def predicted(arguments: list[str], device: str) -> Prediction:
    """Return what `plan` says of a fit."""
    quiet_libraries()
    with contextlib.redirect_stderr(io.StringIO()):
        return Predicting(["plan", *arguments, f"--target={device}"]).prediction


def held_bytes(run: Run) -> int:
    """Return the bytes that this process has of the device: the allocator's highest, and the context."""
    if run.dry:
        return peak_rss_bytes()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


def in_cell(text: str) -> str:
    """Return the last line of a text, such as an error, for a cell of a table."""
    return (text.strip().splitlines() or [""])[-1].replace("|", "/")
