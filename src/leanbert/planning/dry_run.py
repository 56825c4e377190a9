"""One training step on tensors without memory: what `fit` would run, traced before anything is allocated.

The task, its step, its optimizer, Lightning's precision plugin and the callbacks are those of the run; only weights and
batch are fake (`FakeTensorMode`). Whatever a callback changes, the trace sees.
`timing` takes the same steps with values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.values import callbacks_of
from leanbert.compression.teacher_outputs import Outputs, TeacherOutputs, columns_of
from leanbert.data.batches.batch import Batch
from leanbert.data.module import RowData
from leanbert.distributed.communication import Collectives
from leanbert.errors import UserError
from leanbert.measure.timeline import Timeline
from leanbert.measure.torch_compat import unset_fake_temporarily
from leanbert.measure.trace import LiveBytes
from leanbert.memory.offload import DiskStorage, to_host
from leanbert.models.packed_inputs import Documents
from leanbert.optim.build import trainable
from leanbert.planning.fake import Fake, host_apart
from leanbert.planning.run_settings import RunSettings
from leanbert.pretrained.build import blank_model
from leanbert.tasks.base import Task


@dataclass(frozen=True)
class DryRun:
    """Traces of a step and of a validation batch, and what the step adds up to.

    `teacher` is the trace of a teacher whose outputs are kept, before the first step.
    `flops` are those of its passes, `update_flops` those of its update. `gradient_bytes` are those of all gradients of
    the whole model. The bytes of collectives (`Collectives`) are of each micro-batch together, and of the update.
    """

    step: Timeline
    validation: Timeline
    flops: int
    update_flops: int
    parameters: int
    gradient_bytes: int
    passes_bytes: dict[str, int]
    update_bytes: dict[str, int]
    teacher: Timeline | None = None


class _NoOutputs(TeacherOutputs):
    """Stands for outputs on disk, of the shapes of some: what is read of them is zero, for steps that are timed too."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__(Path(), columns_of(outputs))

    def _fill(self, values: Tensor, name: str, rows: list[int]) -> None:
        values.zero_()


class _Nowhere(DiskStorage):
    """Stands for disk or host memory: what is stored leaves the device, and comes back empty."""

    def __init__(self) -> None:
        self._end = self._waiting = self.written_bytes = 0
        self._places = {}

    def _write(self, tensor: Tensor, size: int) -> Any:
        self.written_bytes += size
        return partial(torch.empty, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def _unpack(self, stored: Any) -> Tensor:
        return stored if isinstance(stored, Tensor) else stored()


def dry_run(settings: RunSettings, rows: int) -> DryRun:
    """Trace a step of `rows` sequences, with the optimizer's state there before, and a validation batch.

    Args:
        settings: The run.
        rows: Sequences of the step on one device.

    Raises:
        UserError: Techniques that cannot combine, or match nothing.

    """
    task, data, trainer = stage(settings, rows)
    mode = Fake(settings.device_type)
    host = host_apart(mode) if settings.mesh is not None and settings.offload else nullcontext()
    with warnings.catch_warnings(), mode, host:
        warnings.simplefilter("ignore")
        set_up(task, trainer)
        _forgo_values(task, trainer)
        build(task, trainer, settings)
        _store_nowhere(task)
        batch = blank_batch(settings, data, rows)
        with LiveBytes(task.model, existing=_existing(task, batch)) as trace:
            kept = keep_no_outputs(task, trainer, batch.split(settings.micro_batch)[0])
        teacher = trace.timeline() if kept else None
        begin(task, trainer, batch)
        if settings.mesh is not None:  # sharding allocates in the first step what later ones find
            take_step(task, trainer, blank_batch(settings, data, 1))
        with LiveBytes(task.model, trainer.strategy.optimizers, existing=_existing(task, batch)) as trace:
            mode.flops = trace.flops
            collectives = Collectives(lambda: trace.explicit_phase == "optimizer", reduces_each=task.reduces_each)
            with collectives if settings.mesh is not None else nullcontext():  # another mode takes time
                take_step(task, trainer, batch)
        step = trace.timeline().with_state_before()
        held_out = blank_batch(settings, data, settings.validation_rows, validation=True)
        validation = _validate(task, trainer, held_out)
    update = trace.flops["optimizer"]
    return DryRun(
        step,
        validation,
        flops=trace.flops.total() - update,
        update_flops=update,
        parameters=task.model.num_parameters,
        gradient_bytes=sum(weight.numel() * weight.itemsize for weight in trainable(task.trained.parameters())),
        passes_bytes=dict(collectives.passes),
        update_bytes=dict(collectives.update),
        teacher=teacher,
    )


def blank_batch(settings: RunSettings, data: RowData, rows: int, *, validation: bool = False) -> Batch:
    """Return a batch of rows of one document each, as the loader gives it for the device that is planned for."""
    batch = data.blank_batch(rows, validation=validation)
    return batch.delimited(Documents.whole_rows) if settings.device_type == "cuda" else batch


def stage(
    settings: RunSettings, rows: int, layers: int | None = None, *, real: bool = False
) -> tuple[Task, RowData, Trainer]:
    """Return copies of task and data, and a trainer with the run's precision and callbacks; no weights yet.

    Args:
        settings: The run.
        rows: Sequences of the step on one device.
        layers: Blocks of the model instead of those of the settings.
        real: For steps on the device of the settings, compiled where the run is; else for fake ones.

    """
    task, data = copy.deepcopy(settings.task), copy.deepcopy(settings.data)
    if layers is not None:
        task.encoder_config = replace(task.encoder_config, num_layers=layers)
    task.compile_blocks &= real  # a compiled block needs no more memory than one that is not
    task.init_from = None  # the architecture is in the settings already
    task.build_teacher = blank_model  # type: ignore[method-assign]
    task.schedule_config = replace(task.schedule_config, warmup_steps=0)
    data.hparams["batch_size"] = rows
    data.pretend_prepared(settings.vocab_size)
    callbacks = copy.deepcopy(settings.technique_callbacks)
    trainer = _trainer(settings, callbacks, settings.device_type if real else "cpu")
    trainer.strategy.connect(task)
    task.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    return task, data, trainer


def _trainer(settings: RunSettings, callbacks: Sequence[Callback], device_type: str) -> Trainer:
    return Trainer(
        accelerator=device_type, devices=1, logger=False, callbacks=list(callbacks), precision=settings.precision,
        gradient_clip_val=settings.clip, max_steps=2**31, max_epochs=-1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def set_up(task: Task, trainer: Trainer) -> None:
    """Let the callbacks register what they ask for. Raises UserError for what they refuse, or cannot be planned."""
    task.setup("fit")
    for callback in callbacks_of(trainer, TechniqueCallback):
        callback.setup(trainer, task, "fit")
    if (task.techniques.micro_batch or 0) >= trainer.datamodule.hparams["batch_size"]:  # type: ignore[attr-defined]
        raise UserError(
            "plan: a micro-batch schedule that begins or ends with the whole batch. Plan its largest alone."
        )


def build(task: Task, trainer: Trainer, settings: RunSettings) -> None:
    """Make weights, metrics and optimizer on the trainer's device, sharded over a mesh if there is one."""
    strategy: Any = trainer.strategy
    here, shards = task.surroundings(), settings.mesh is not None
    around = replace(here, device_type=settings.device_type, world_size=settings.devices, shards=shards)
    around = replace(around, offloads=shards and settings.offload)
    with strategy.tensor_init_context(), strategy.precision_plugin.module_init_context():
        task.build(around, settings.mesh, fill=False)  # in the target dtype: nothing is left to convert
    strategy.optimizers = [task.configure_optimizers()["optimizer"]]


def _forgo_values(task: Task, trainer: Trainer) -> None:
    """Leave out loss scaling, which reads values; make the metrics with values, for they copy in a way of their own."""
    plugin: Any = trainer.strategy.precision_plugin
    if isinstance(plugin, MixedPrecision):
        plugin.scaler = None  # holds no memory
    with unset_fake_temporarily():
        task.build_metrics()
    task.build_metrics = lambda: None  # type: ignore[method-assign]


def _store_nowhere(task: Task) -> None:
    for stack in task.model.stacks:
        if stack.storage is to_host or isinstance(stack.storage, DiskStorage):
            stack.storage = _Nowhere()


def keep_no_outputs(task: Task, trainer: Trainer, batch: Batch) -> bool:
    """Let a teacher whose outputs are kept run and go, as before the first step; return whether there is one."""
    if not keeps_outputs(task):
        return False
    task.distillation.keep(_NoOutputs(run_teacher(task, trainer, batch)))  # type: ignore[union-attr]
    return True


def keeps_outputs(task: Task) -> bool:
    """Return whether there is a teacher whose outputs are kept."""
    return task.distillation is not None and task.distillation.config.cache


def run_teacher(task: Task, trainer: Trainer, batch: Batch) -> Outputs:
    """Return the outputs of the teacher, computed in the run's precision."""
    with trainer.strategy.precision_plugin.train_step_context():
        return task.distillation.outputs(task.model_inputs(batch))  # type: ignore[union-attr]


def begin(task: Task, trainer: Trainer, batch: Batch) -> None:
    """Do what comes before the first step."""
    for callback in callbacks_of(trainer, TechniqueCallback):
        callback.reach_peak()
        callback.on_train_start(trainer, task)
        callback.on_train_batch_start(trainer, task, batch, 0)
    task.train()


def take_step(task: Task, trainer: Trainer, batch: Batch, after_backward: Callable[[], object] = lambda: None) -> None:
    """Do what Lightning does for a batch in automatic optimization; `after_backward` comes before the update."""
    strategy: Any = trainer.strategy
    optimizer = strategy._lightning_optimizers[0]

    def closure() -> Tensor:
        loss = strategy.training_step(batch, 0)["loss"]
        strategy.backward(loss, optimizer)
        after_backward()
        return loss.detach()

    task.optimizer_step(0, 0, optimizer, closure)


def _validate(task: Task, trainer: Trainer, batch: Batch) -> Timeline:
    task.eval()
    optimizers, existing = trainer.strategy.optimizers, _existing(task, batch)
    with torch.no_grad(), LiveBytes(task.model, optimizers, existing=existing, first_phase="validation") as trace:
        trainer.strategy.validation_step(batch, 0)
    return trace.timeline()


def _existing(task: Task, batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch, of techniques (masks), and those of a task that are not its model's (metrics)."""
    model = {id(tensor) for tensor in (*task.model.parameters(), *task.model.buffers())}
    own = [t for module in task.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    if task.distillation is not None:
        own += task.distillation.teacher.parameters()
    for callback in callbacks_of(task.trainer, TechniqueCallback):
        own += callback.tensors()
    return [*(t for t in (*own, *task.buffers()) if id(t) not in model), *batch.tensors().values()]
