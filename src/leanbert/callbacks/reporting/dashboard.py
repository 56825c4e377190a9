"""What TensorBoard shows first: a page of curves, loss and quality above memory, and a row to compare runs by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.reporting.report import micro_batch_sequences
from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.values import callbacks_of, data_of, task_of, tensorboard_writers
from leanbert.measure.timeline import CATEGORIES, PHASES
from leanbert.tasks.base import Task

SETTINGS_SHOWN = ("techniques", "optimizer", "precision", "micro_batch", "parameters")
"""Settings that the HParams page shows at once; the others are there to be ticked."""

RESULTS_SHOWN = ("val/loss", "memory/peak_mib", "train/mean_tokens_per_second")
"""Tags whose last values the HParams page shows for each run."""

LOSSES = r"val/\w*loss$"
"""The losses of validation, whichever a task has: tags of a chart are regular expressions."""


class Dashboard(Callback):
    """Lay out TensorBoard's page of custom scalars, and write the run's row of the HParams page.

    Both are of the run itself: there are no runs below it.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write layout and settings: the validation before step 1 has told which metrics there are."""
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(page_layout(trainer.callback_metrics, pl_module.device.type, trainer.world_size))
            for summary in hparams_start(compared_settings(trainer, task_of(pl_module))):
                writer.file_writer.add_summary(summary)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that the run has finished; of one that was stopped there is no end, for it may go on."""
        for writer in tensorboard_writers(trainer):
            writer.file_writer.add_summary(hparams_end())


def compared_settings(trainer: Trainer, task: Task) -> dict[str, str | float]:
    """Return what may differ between the runs of a task, by name: techniques first, then sizes."""
    names = [type(callback).__name__ for callback in callbacks_of(trainer, TechniqueCallback)]
    settings, config = data_of(trainer).hparams, task.model.config
    return {
        "techniques": ", ".join(names) or "none",
        "optimizer": task.optimizer_config.name,
        "precision": str(trainer.precision),
        "learning_rate": task.optimizer_config.lr,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "parameters": task.model.num_parameters,
        "max_length": settings["max_length"],
        "batch_size": settings["batch_size"],
        "micro_batch": micro_batch_sequences(trainer, task),
        "devices": trainer.world_size,
        "seed": task.seed,
    }


def hparams_start(settings: Mapping[str, str | float]) -> list[Any]:
    """Return the summaries that open a run's row on the HParams page: its columns, and the `settings` in them.

    `SummaryWriter.add_hparams` writes them into a run below the run, and an end at once.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary  # only here: it takes a while
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
    from torch.utils.tensorboard.summary import hparams

    columns = api_pb2.Experiment(
        hparam_infos=[
            api_pb2.HParamInfo(
                name=name,
                type=api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64,
                differs=name in SETTINGS_SHOWN,
            )
            for name, value in settings.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in RESULTS_SHOWN],
    )
    data = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(experiment=columns))
    return [Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=data)]), hparams(dict(settings), {})[1]]


def hparams_end() -> Any:
    """Return the summary that closes the row of a run that has finished."""
    from torch.utils.tensorboard.summary import hparams

    return hparams({}, {})[2]


def page_layout(metrics: Iterable[str], device_type: str, devices: int) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the page of custom scalars: sections and charts in the order in which one asks.

    TensorBoard's other pages sort tags by name, and memory comes first.

    Args:
        metrics: Tags of the validation among others.
        device_type: What the run trains on.
        devices: How many of them.

    """
    found = [tag for tag in metrics if tag.startswith("val/") and tag.count("/") == 1]
    memory = {
        "at the peak, by category": [f"memory/category/{name}_mib" for name in CATEGORIES],
        "peak by phase": [f"memory/phase/{phase}_peak_mib" for phase in PHASES if phase != "validation"],
        "peak of validation": ["memory/phase/validation_peak_mib"],  # of fewer points, it would be cut off as outliers
        "highest peak so far, and resident": ["memory/peak_mib", "memory/rss_mib"],
    }
    if device_type != "cpu":
        memory["of the device"] = ["memory/allocated_mib", "memory/reserved_mib"]
    if device_type == "cuda":
        memory["of the device"] += ["memory/active_mib", "memory/fragmented_mib", "memory/device_used_mib"]
    sections = {
        "Loss and quality": {
            "loss": ["train/loss", LOSSES],  # the same for all tasks: charts that differ are shown beside each other
            **{tag.removeprefix("val/"): [tag] for tag in found if not re.match(LOSSES, tag)},
        },
        "Memory (MiB)": memory,
        "Speed": {
            "tokens per second": ["train/tokens_per_second", "train/mean_tokens_per_second"],
            "learning rate": ["train/learning_rate"],
        },
    }
    if devices > 1:
        memory["of the fullest device"] = ["memory/fullest_device_mib"]
        sections["Communication"] = {
            "bytes sent per step": ["communication/bytes_per_step"],
            "share of a step spent waiting": ["communication/wait_share"],
        }
    if device_type == "cuda":
        sections["Speed"]["allocation retries"] = ["memory/allocation_retries"]
    return {
        section: {title: ["Multiline", tags] for title, tags in charts.items()} for section, charts in sections.items()
    }
