"""Where the memory of a run goes: TensorBoard's memory page, a table at the end, a report when memory runs out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from leanbert.callbacks.reporting.sampling import SampleClock
from leanbert.callbacks.values import log_values, tensorboard_writers
from leanbert.errors import UserError
from leanbert.measure.counters import cuda_allocator, device_bytes, restart_peak
from leanbert.measure.figures import breakdown_figure, pixels, timeline_figure
from leanbert.measure.oom_report import Makers, find_live, makers_by_size, oom_report
from leanbert.measure.timeline import CATEGORIES, LAYER_COLUMNS, PHASES, Timeline, layer_rows
from leanbert.measure.torch_compat import compiled, keep_cuda_history, write_cuda_history
from leanbert.measure.trace import LiveBytes, live_tensors
from leanbert.memory.recovery import is_out_of_memory
from leanbert.messages import say, say_once
from leanbert.ranges import COUNT
from leanbert.tasks.tables import markdown_table
from leanbert.tasks.techniques import advice
from leanbert.units import MIB

REDRAW_FRACTION = 0.01
"""Part of the peak by which it must have changed for figures to be drawn again."""

SNAPSHOT_EVENTS = 100_000
"""Allocations and frees that a CUDA snapshot reaches back."""


class MemoryMonitor(Callback):
    """Count every byte of live tensors in sampled steps; between them nothing is traced and nothing slows down.

    The second step of a process is sampled (the first one creates the optimizer's state), later ones as often as 1.5 %
    of the time allow (`SampleClock`), and the first batch of each validation. Figures are drawn where the peak has
    changed. A sampled step computes what it would compute without: with torch.compile its blocks run uncompiled. On
    CUDA the peaks of phases are the allocator's own, at every logged step.

    Args:
        sample_every_n_steps: Steps between two later samples. Default: as many as keep their cost low.
        cuda_snapshot: Keep a history of allocations and write `oom_snapshot.pickle`, for
            https://pytorch.org/memory_viz, when memory runs out; CUDA only.

    Raises:
        UserError: `sample_every_n_steps` is not positive; `cuda_snapshot` without CUDA.

    """

    def __init__(self, sample_every_n_steps: int | None = None, cuda_snapshot: bool = False) -> None:
        COUNT.check("MemoryMonitor.sample_every_n_steps", sample_every_n_steps)
        self.cuda_snapshot = cuda_snapshot
        self._clock = SampleClock(sample_every_n_steps)
        self.peaks: dict[str, dict[str, int]] = {}  # bytes by category at the highest peak of each phase
        self._device_peaks: dict[str, int] = {}  # bytes by phase that the device counted, the highest
        self._step_peaks: dict[str, int] = {}  # those of this step
        self._makers: Makers = {}
        self._trace: LiveBytes | None = None
        self._folder: Path | None = None
        self._drawn_bytes = 0  # the peak that the last figures show
        self._at_borders = False

    # ---- results

    @property
    def sampled(self) -> bool:
        """Whether a training step has been sampled."""
        return "forward" in self.peaks

    def summary(self) -> dict[str, Any]:
        """Return `peak_bytes`, `by_phase` and `by_category` (at the peak) for `summary.json`; empty: no sample."""
        if not self.sampled:
            return {}
        totals = {phase: sum(self.peaks[phase].values()) for phase in PHASES if phase in self.peaks}
        highest = max(totals, key=totals.__getitem__)
        return {
            "peak_bytes": totals[highest],
            "by_phase": {**totals, **self._device_peaks},
            "by_category": self.peaks[highest],
        }

    # ---- a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a CUDA snapshot where there is no CUDA."""
        if self.cuda_snapshot and stage == "fit":
            if trainer.strategy.root_device.type != "cuda":
                raise UserError("MemoryMonitor.cuda_snapshot: needs a CUDA device. Set it to false.")
            keep_cuda_history(SNAPSHOT_EVENTS)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the run's folder, which cannot be asked for after an exception; choose how to time steps."""
        if trainer.strategy.root_device.type == "cpu":
            self._clock.clock = time.thread_time  # all is computed in this thread, and other processes do not count
        log_dir = trainer.log_dir  # exchanged between ranks
        self._folder = Path(log_dir) if log_dir is not None else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Begin a sample when one is due."""
        step = trainer.global_step + 1
        if self._clock.begin(step) and trainer.is_global_zero:
            self._begin(trainer, pl_module, "forward")
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._at_borders = trainer.strategy.root_device.type == "cuda" and step % every == 0
        if self._at_borders:
            self._step_peaks = {}
            restart_peak(trainer.strategy.root_device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """End the forward pass of a micro-batch."""
        self._border(trainer, "forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the backward pass of a micro-batch."""
        self._border(trainer, "backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Begin the update: Lightning calls this after the last backward pass, before gradients are clipped."""
        if self._trace is not None:
            self._trace.enter_phase("optimizer")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """End the sample and show it."""
        self._border(trainer, "optimizer")
        timeline = self._end()
        if timeline is not None:
            self._makers = makers_by_size(timeline.saved)
            log_values(trainer, self._metrics(trainer, timeline))
            if abs(timeline.peak_bytes - self._drawn_bytes) > REDRAW_FRACTION * self._drawn_bytes:
                self._drawn_bytes = timeline.peak_bytes
                self._show(trainer, timeline)
        self._clock.end(sampled=timeline is not None)
        if self._at_borders:
            phases = {f"memory/phase/{name}_peak_mib": size / MIB for name, size in self._step_peaks.items()}
            log_values(trainer, {**phases, **cuda_allocator(trainer.strategy.root_device)})

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sample the first batch of a validation: all are of one size."""
        if batch_idx == 0 and dataloader_idx == 0 and trainer.state.fn == "fit" and trainer.is_global_zero:
            self._begin(trainer, pl_module, "validation")

    def on_validation_batch_end(self, trainer: Trainer, *_: object, **__: object) -> None:
        """Log the peak."""
        timeline = self._end()
        if timeline is not None:
            validation = {"memory/phase/validation_peak_mib": timeline.peak_bytes / MIB}
            log_values(trainer, {**validation, **self._peak(trainer)})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        lines = terminal_table(self.peaks) if self.sampled else ["Memory       not measured: fewer than two steps"]
        for line in lines:
            say(line)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop tracing; if memory ran out, report what was live while it still is."""
        try:
            if is_out_of_memory(exception):
                self._report(trainer, pl_module, exception)
        finally:
            self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop recording the CUDA history."""
        if self.cuda_snapshot and stage == "fit":
            keep_cuda_history(None)

    # ---- samples

    def _begin(self, trainer: Trainer, module: LightningModule, phase: str) -> None:
        if phase == "forward" and any(compiled(part) for part in module.modules()):
            say_once(
                "Memory       in sampled steps compiled blocks run uncompiled, and may need more than compiled ones"
            )
        self._trace = LiveBytes(
            _model(module),
            trainer.optimizers,
            existing=live_tensors(),
            device_type=trainer.strategy.root_device.type,
            first_phase=phase,
        )
        self._trace.__enter__()

    def _end(self) -> Timeline | None:
        if self._trace is None:
            return None
        trace, self._trace = self._trace, None
        trace.__exit__()
        timeline = trace.timeline()
        for phase, categories in timeline.categories_by_phase.items():
            if sum(categories.values()) > sum(self.peaks.get(phase, {}).values()):
                self.peaks[phase] = categories
        return timeline

    def _metrics(self, trainer: Trainer, timeline: Timeline) -> dict[str, float]:
        metrics = {f"memory/category/{name}_mib": size / MIB for name, size in timeline.by_category.items()}
        if peak := self._peak(trainer):
            phases = {f"memory/phase/{name}_peak_mib": size / MIB for name, size in timeline.by_phase.items()}
            metrics |= {**phases, **peak}
        return metrics

    def _peak(self, trainer: Trainer) -> dict[str, float]:
        """Return the highest peak so far, unless the device counts it at every step; none before the first sample."""
        if not self.sampled or "peak" in device_bytes(trainer.strategy.root_device):
            return {}
        return {"memory/peak_mib": self.summary()["peak_bytes"] / MIB}

    def _show(self, trainer: Trainer, timeline: Timeline) -> None:
        """Draw the figures and write the table of layers."""
        step = trainer.global_step
        phases = {**timeline.categories_by_phase}
        if "validation" in self.peaks:
            phases["validation"] = self.peaks["validation"]
        for writer in tensorboard_writers(trainer):
            for tag, figure in (
                ("memory/timeline", timeline_figure(timeline, f"Live tensors during step {step:,}")),
                ("memory/breakdown", breakdown_figure(phases, f"Where the memory goes, step {step:,}")),
            ):
                writer.add_image(tag, pixels(figure), step, dataformats="HWC")
            writer.add_text(
                "memory/activations_by_layer", markdown_table(LAYER_COLUMNS, layer_rows(timeline.saved)), step
            )

    def _border(self, trainer: Trainer, ended: str) -> None:
        """Take the device's peak at the end of a phase, in steps that are logged."""
        if self._at_borders:
            peak = restart_peak(trainer.strategy.root_device)
            for peaks in (self._step_peaks, self._device_peaks):
                peaks[ended] = max(peak, peaks.get(ended, 0))

    def _report(self, trainer: Trainer, module: LightningModule, error: BaseException) -> None:
        built = getattr(module, "model", None) is not None
        when = f"in step {trainer.global_step + 1:,}" if built else "while the model was being built"
        if self._trace is not None:
            live = self._trace.live()
        else:
            device_type = trainer.strategy.root_device.type
            live = find_live(_model(module), trainer.optimizers, device_type, self._makers)
        text = oom_report(error, live, when, advice())
        say(text)
        for writer in tensorboard_writers(trainer):
            writer.add_text("memory/out_of_memory", f"```\n{text}\n```", trainer.global_step)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
            (self._folder / f"oom{rank}.txt").write_text(text + "\n", encoding="utf-8")
            if self.cuda_snapshot:
                write_cuda_history(str(self._folder / f"oom_snapshot{rank}.pickle"))


def terminal_table(peaks: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return the lines of a table of MiB: bytes by category (columns) at the peak of each phase (rows)."""
    lines = [f"{'Memory, MiB':<12} {'peak':>10}" + "".join(f" {name:>11}" for name in CATEGORIES)]
    for phase in PHASES:
        if phase in peaks:
            sizes = [peaks[phase][name] / MIB for name in CATEGORIES]
            lines.append(f"{phase:<12} {sum(sizes):>10,.1f}" + "".join(f" {size:>11,.1f}" for size in sizes))
    return lines


def _model(module: Any) -> nn.Module:
    """Return the task's model, so that names begin inside it."""
    return getattr(module, "model", None) or module
