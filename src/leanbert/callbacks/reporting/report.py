"""What a run says of itself: a summary before step 1, `summary.json` and a closing word at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback

from leanbert import strict_json
from leanbert.callbacks.loop.checkpoint import RunCheckpoint
from leanbert.callbacks.loop.interrupt import Interrupted
from leanbert.callbacks.reporting.memory_monitor import MemoryMonitor
from leanbert.callbacks.reporting.plan import PlanReport
from leanbert.callbacks.reporting.step_monitor import StepMonitor
from leanbert.callbacks.values import callbacks_of, data_of, rows_per_device, task_of
from leanbert.data.batches.batch import Batch
from leanbert.data.module import RowData
from leanbert.data.statistics import CorpusStatistics, knows_more
from leanbert.files import write_text_atomically
from leanbert.measure.counters import device_bytes, device_name, peak_rss_bytes
from leanbert.memory.precision import has_16_bit_products
from leanbert.messages import say
from leanbert.tasks.base import Task
from leanbert.units import format_duration

MUCH_UNKNOWN = 0.01
"""A larger share of unknown tokens is told with what to do."""

BACKWARD_TO_FORWARD = 3.0  # a training step costs about three forward passes: one forward, two in backward


class StartReport(Callback):
    """Print corpus, model, device and estimated time once, before step 1."""

    def __init__(self) -> None:
        self._validation_started = 0.0
        self._seconds_per_token: float | None = None
        self._tokens = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time the validation before step 1: the only measurement there is so far."""
        self._validation_started, self._tokens = time.perf_counter(), 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, *_: object
    ) -> None:
        """Count its tokens."""
        self._tokens += batch.tokens

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep its speed."""
        if self._tokens:
            self._seconds_per_token = (time.perf_counter() - self._validation_started) / self._tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the report."""
        for line in start_report(trainer, task_of(pl_module), self._seconds_per_token):
            say(line)


def start_report(trainer: Trainer, task: Task, seconds_per_token: float | None) -> list[str]:
    """Return the lines of the report; `seconds_per_token` of a forward pass is None where it was not measured."""
    data = data_of(trainer)
    config, rows, length = task.model.config, data.hparams["batch_size"], data.hparams["max_length"]
    steps = max(0, int(trainer.estimated_stepping_batches) - trainer.global_step)
    lines = describe_corpora(data)
    vocabulary = " and ".join(f"{tokens:,}" for _, tokens in task.model.token_tables)
    lines.append(
        f"{'model':<11} {config.preset}, {config.num_layers} x {config.hidden_size}, "
        f"vocabulary {vocabulary}, {task.model.num_parameters:,} parameters"
    )
    if task.distillation is not None:
        teacher = task.distillation.teacher
        theirs, path = teacher.config, task.teacher_source
        lines.append(
            f"{'teacher':<11} {theirs.preset}, {theirs.num_layers} x {theirs.hidden_size}, "
            f"{teacher.num_parameters:,} parameters, {path}"
        )
    threads = f", {torch.get_num_threads()} threads" if task.device.type == "cpu" else ""
    lines.append(f"{'device':<11} {task.device.type} x {trainer.world_size}{threads}, precision {trainer.precision}")
    if "16" in str(trainer.precision) and not has_16_bit_products(task.device.type):
        lines.append(f"{'':<11} this processor has no 16-bit matrix products: 32-true would be many times as fast")
    estimate = ""
    if seconds_per_token is not None:
        seconds = steps * rows * length * seconds_per_token * BACKWARD_TO_FORWARD / trainer.world_size
        estimate = f", about {format_duration(seconds)} and validation"
    epochs = steps / data.batches_per_epoch
    lines.append(f"{'run':<11} {steps:,} steps of {rows} x {length} tokens = {epochs:.2f} epochs{estimate}")
    return lines


def describe_corpora(data: RowData) -> list[str]:
    """Return a line for training and for validation, and what to do where the tokenizer does not know the text."""
    length, corpora = data.hparams["max_length"], data.statistics.items()
    lines = [f"{name:<11} {_describe_corpus(statistics, data.unit, length)}" for name, statistics in corpora]
    return lines + _warn_of_unknown(data)


def _describe_corpus(statistics: CorpusStatistics, unit: str, length: int) -> str:
    return (
        f"{statistics.documents:,} {unit}, {statistics.tokens:,} tokens ({statistics.unknown_fraction:.2%} unknown), "
        f"{statistics.rows:,} rows of {length} ({statistics.tokens_per_row / length:.1%} real tokens)"
    )


def _warn_of_unknown(data: RowData) -> list[str]:
    """Return what to do where the tokenizer does not know the text."""
    name, share = max(
        ((name, part.unknown_fraction) for name, part in data.statistics.items()), key=lambda item: item[1]
    )
    if share <= MUCH_UNKNOWN:
        return []
    return [
        f"{'':<11} {share:.0%} of the tokens of {name} are unknown and cannot be learnt: set {knows_more(data.hparams)}"
    ]


class ConfigFile(SaveConfigCallback):
    """Write `config.yaml` into the run's folder, atomically."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the settings that this run has, also where it goes on."""
        log_dir = trainer.log_dir  # exchanged between ranks
        if trainer.is_global_zero and log_dir is not None:
            text = self.parser.dump(self.config, skip_none=False)
            write_text_atomically(Path(log_dir) / self.config_filename, text)


class RunSummary(Callback):
    """Write `summary.json` into the run's folder, atomically, however the run ends; keep tokenizers and plan there."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._metrics: dict[str, float] = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the metrics: the summary of a run that goes on from here has them."""
        checkpoint["metrics"] = tagged(trainer.callback_metrics)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the metrics, but not what is measured at the end."""
        kept = checkpoint.get("metrics", {})
        self._metrics = {tag: value for tag, value in kept.items() if not tag.startswith("average/")}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep tokenizers beside the checkpoints, and the plan that the run follows, if it follows one."""
        log_dir = trainer.log_dir  # exchanged between ranks: all of them ask, and never after an exception
        resumed = Path(trainer.ckpt_path or "").resolve()
        if log_dir is not None and Path(log_dir).resolve() in resumed.parents:
            trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in self._metrics.items()})
        if trainer.is_global_zero and log_dir is not None:
            self.folder = Path(log_dir)
            for name, tokenizer in data_of(trainer).tokenizers.items():
                tokenizer.save(self.folder / name)
            for plan in callbacks_of(trainer, PlanReport):
                strict_json.write(self.folder / "plan.json", plan.plan)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary of a finished run, after the last checkpoint."""
        self._write(trainer, pl_module, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the summary of an interrupted or failed run."""
        stopped = isinstance(exception, (Interrupted, KeyboardInterrupt))
        self._write(trainer, pl_module, "interrupted" if stopped else "failed")

    def _write(self, trainer: Trainer, module: LightningModule, status: str) -> None:
        if self.folder is not None:
            strict_json.write(self.folder / "summary.json", run_summary(trainer, task_of(module), status))


def run_summary(trainer: Trainer, task: Task, status: str) -> dict[str, Any]:
    """Return the contents of `summary.json`; sizes are in bytes.

    `peak_bytes` is there where the device counts live tensors or a MemoryMonitor has sampled a step, `by_phase` and
    `by_category` where it has.
    """
    monitor, checkpoint = callbacks_of(trainer, StepMonitor)[0], callbacks_of(trainer, RunCheckpoint)[0]
    summary: dict[str, Any] = {
        "status": status,
        "metrics": tagged(trainer.callback_metrics),
        "steps": trainer.global_step,
        "tokens": monitor.tokens,
        "seconds": monitor.seconds,
        "tokens_per_second": monitor.tokens_per_second,
        "device": device_name(task.device),
        "precision": str(trainer.precision),
        "parameters": task.model.num_parameters,
        "micro_batch_sequences": micro_batch_sequences(trainer, task),
        "effective_batch_sequences": data_of(trainer).hparams["batch_size"],
        "peak_rss_bytes": peak_rss_bytes(),
        "checkpoint": checkpoint.last_path,
    }
    for memory in callbacks_of(trainer, MemoryMonitor):
        summary.update(memory.summary())
    for plan in callbacks_of(trainer, PlanReport):
        summary["predicted_peak_bytes"] = plan.predicted_bytes
    peak = device_bytes(task.device).get("peak")  # counts every step, not the sampled ones only
    return summary if peak is None else {**summary, "peak_bytes": peak}


def micro_batch_sequences(trainer: Trainer, task: Task) -> int:
    """Return the sequences that go through a block at a time on each device."""
    return task.step_state.micro_batch or task.techniques.slice_rows or rows_per_device(trainer)


def tagged(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that TensorBoard has under the same tag; the others are the progress bar's."""
    return {tag: float(value) for tag, value in metrics.items() if "/" in tag}
