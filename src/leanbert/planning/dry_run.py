"""One training step on tensors without memory: what `fit` would run, traced before anything is allocated.

The task, its step, its optimizer, Lightning's precision plugin and the callbacks are those of the run; only weights and
batch are fake (`torch._subclasses.FakeTensorMode`). Whatever a callback changes, the trace sees.
`timing` takes the same steps with values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from leanbert.distributed.sharding import Collectives, shard
from leanbert.measure.timeline import Timeline
from leanbert.measure.trace import LiveBytes
from leanbert.memory.offload import DiskStorage, to_host
from leanbert.optim.build import trainable

OBSERVERS = ("MemoryMonitor",)
"""Callbacks of LeanBERT that only look on."""


@dataclass(frozen=True)
class RunSettings:
    """What decides the memory of a run: objects as the command line makes them, none of which holds weights or data."""

    task: Any
    data: LightningDataModule
    callbacks: tuple[Callback, ...]
    precision: Any
    clip: float | None = None
    vocab_size: int | None = None
    """Of the tokenizer; None: `data.vocab_size`, which a trained one does not exceed."""
    device_type: str = "cpu"
    """The device that is planned for."""
    rows: int | None = None
    """Sequences of a step on each device; None: `data.batch_size`."""
    devices: int = 1
    """Devices of the run: they share the validation batch, and techniques may disapprove of their number."""
    mesh: Any = None
    """`DeviceMesh` of a process group, over which FSDP2 shards the model; None: it is whole on each device."""

    def callback(self, kind: str) -> Any:
        """Return the callback of the class named `kind`, or None."""
        return next((callback for callback in self.callbacks if type(callback).__name__ == kind), None)

    def with_encoder(self, **dimensions: Any) -> RunSettings:
        """Return the settings with other dimensions of the encoder."""
        task = copy.deepcopy(self.task)
        task.encoder_config = replace(task.encoder_config, **dimensions)
        return replace(self, task=task)

    @property
    def accumulated_rows(self) -> int | None:
        """The largest micro-batch of gradient accumulation on each device; None without it."""
        accumulation = self.callback("GradientAccumulation")
        return None if accumulation is None else max(accumulation.schedule.values())

    @property
    def slice_rows(self) -> int | None:
        """Sequences of a slice of layer-major execution; None without it."""
        layer_major = self.callback("LayerMajor")
        return None if layer_major is None else layer_major.micro_batch

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass on each device."""
        bounds = (self.rows_per_step, self.accumulated_rows, self.slice_rows)
        return min(rows for rows in bounds if rows is not None)

    @property
    def rows_per_step(self) -> int:
        """Sequences of a step on each device."""
        return int(self.rows or self.data.hparams["batch_size"])

    @property
    def targets_per_row(self) -> int:
        """Targets of one sequence."""
        return int(self.data.blank_batch(1).targets.numel())  # type: ignore[attr-defined]

    @property
    def validation_rows(self) -> int:
        """Sequences of a validation batch on each device."""
        shared = self.data.hparams["val_batch_size"]
        return -(-shared // self.devices) if shared else self.rows_per_step

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence in a batch."""
        batch = self.data.blank_batch(1)  # type: ignore[attr-defined]
        return sum(int(tensor.nbytes) for tensor in _tensors_of(batch))


@dataclass(frozen=True)
class Totals:
    """What a step adds up to: floating-point operations of its passes and of its update, and bytes.

    `gradient_bytes` are those of all gradients of the whole model. The bytes of collectives (`Collectives`) are of
    each micro-batch together, and of the update.
    """

    flops: int
    update_flops: int
    parameters: int
    gradient_bytes: int
    passes_bytes: dict[str, int]
    update_bytes: dict[str, int]


@dataclass(frozen=True)
class Rehearsal:
    """Traces of a step and of a validation batch, and the step's totals."""

    step: Timeline
    validation: Timeline
    totals: Totals


class _Nowhere(DiskStorage):
    """Stands for disk or host memory: what is stored leaves the device, and comes back empty."""

    def __init__(self) -> None:
        self._end = self._waiting = self.written_bytes = 0
        self._places = {}

    def _write(self, tensor: Tensor, size: int) -> Any:
        self.written_bytes += size
        return _Place(tensor)

    def _unpack(self, stored: Any) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        return torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)


class _Fake(FakeTensorMode):
    """Tensors without values, of which a value that is read back is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            return 1.0 if kind.is_floating_point else True if kind is torch.bool else 1
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class _Place:
    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device


def rehearse(settings: RunSettings, rows: int, *, layers: int | None = None) -> Rehearsal:
    """Trace a step of `rows` sequences, with the optimizer's state there before, and a validation batch.

    Args:
        settings: The run.
        rows: Sequences of the step on one device.
        layers: Blocks of the model instead of those of the settings.

    Raises:
        UserError: Techniques that cannot combine, or match nothing.

    """
    task, data, trainer = stage(settings, rows, layers)
    with warnings.catch_warnings(), _Fake(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        set_up(task, trainer)
        _forgo_values(task, trainer)
        build(task, trainer, settings.mesh)
        _store_nowhere(task)
        batch = data.blank_batch(rows)  # type: ignore[attr-defined]
        begin(task, trainer, batch)
        if settings.mesh is not None:  # sharding allocates in the first step what later ones find
            take_step(task, trainer, data.blank_batch(1))  # type: ignore[attr-defined]
        existing = [*_tensors_of(task), *_tensors_of(batch)]
        optimizers = trainer.strategy.optimizers
        with LiveBytes(task.model, optimizers, existing=existing) as trace:
            collectives = Collectives(trace)
            with collectives if settings.mesh is not None else nullcontext():  # another mode takes time
                take_step(task, trainer, batch)
        step = trace.timeline().with_state_before()
        blank = data.blank_batch(settings.validation_rows, validation=True)  # type: ignore[attr-defined]
        validation = _validate(task, trainer, blank)
    update = trace.flops["optimizer"]
    gradient_bytes = sum(parameter.numel() * parameter.itemsize for parameter in trainable(task.model.parameters()))
    totals = Totals(
        trace.flops.total() - update, update, task.model.num_parameters,
        gradient_bytes, dict(collectives.passes), dict(collectives.update),
    )  # fmt: skip
    return Rehearsal(step, validation, totals)


def stage(
    settings: RunSettings, rows: int, layers: int | None, *, real: bool = False
) -> tuple[Any, LightningDataModule, Trainer]:
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
    task.schedule_config = replace(task.schedule_config, warmup_steps=0)
    task.planned_device, task.planned_world_size = settings.device_type, settings.devices
    task.planned_sharding = settings.mesh is not None
    data.hparams["batch_size"] = rows
    data.pretend_prepared(settings.vocab_size)  # type: ignore[attr-defined]
    callbacks = [copy.deepcopy(c) for c in settings.callbacks if _takes_part(c)]
    trainer = _trainer(settings, callbacks, settings.device_type if real else "cpu")
    trainer.strategy.connect(task)
    task.trainer = data.trainer = trainer
    trainer.datamodule = data  # type: ignore[attr-defined]
    return task, data, trainer


def _takes_part(callback: Callback) -> bool:
    kind = type(callback)
    return kind.__module__.startswith("leanbert.") and kind.__name__ not in OBSERVERS


def _trainer(settings: RunSettings, callbacks: list[Callback], device_type: str) -> Trainer:
    return Trainer(
        accelerator=device_type, devices=1, logger=False, callbacks=callbacks, precision=settings.precision,
        gradient_clip_val=settings.clip, max_steps=2**31, max_epochs=-1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip


def set_up(task: Any, trainer: Trainer) -> None:
    """Let the callbacks register what they ask for."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        callback.setup(trainer, task, "fit")


def build(task: Any, trainer: Trainer, mesh: Any = None) -> None:
    """Make weights, metrics and optimizer on the trainer's device, sharded over a mesh if there is one."""
    strategy: Any = trainer.strategy
    with strategy.tensor_init_context(), strategy.precision_plugin.module_init_context():
        task.configure_model()  # in the target dtype: nothing is left to convert
    if mesh is not None:
        shard(task.model, mesh)
    strategy.optimizers = [task.configure_optimizers()["optimizer"]]


def _forgo_values(task: Any, trainer: Trainer) -> None:
    """Leave out loss scaling, which reads values; make the metrics with values, for they copy in a way of their own."""
    plugin: Any = trainer.strategy.precision_plugin
    if isinstance(plugin, MixedPrecision):
        plugin.scaler = None  # holds no memory
    with unset_fake_temporarily():
        task.build_metrics()
    task.build_metrics = lambda: None


def _store_nowhere(task: Any) -> None:
    encoder = task.model.encoder
    if encoder.storage is to_host or isinstance(encoder.storage, DiskStorage):
        encoder.storage = _Nowhere()


def begin(task: Any, trainer: Trainer, batch: Any) -> None:
    """Do what comes before the first step."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _pretend_it_has_begun(callback)
        callback.on_train_start(trainer, task)
        callback.on_train_batch_start(trainer, task, batch, 0)
    task.train()


def _pretend_it_has_begun(callback: Callback) -> None:
    """Bring a callback that comes in later to its end: masks are there, micro-batches are the largest."""
    state = callback.state_dict()
    if "sparsity" in state:
        callback.load_state_dict({"sparsity": getattr(callback, "final_sparsity", 0.5)})
    schedule = getattr(callback, "schedule", None)
    if isinstance(schedule, dict):
        callback.schedule = {0: max(schedule.values())}  # type: ignore[attr-defined]


def take_step(task: Any, trainer: Trainer, batch: Any, after_backward: Callable[[], object] = lambda: None) -> None:
    """Do what Lightning does for a batch in automatic optimization; `after_backward` comes before the update."""
    strategy: Any = trainer.strategy
    optimizer = strategy._lightning_optimizers[0]

    def closure() -> Tensor:
        loss = strategy.training_step(batch, 0)["loss"]
        strategy.backward(loss, optimizer)
        after_backward()
        return loss.detach()

    task.optimizer_step(0, 0, optimizer, closure)


def _validate(task: Any, trainer: Trainer, batch: Any) -> Timeline:
    task.eval()
    existing = [*_tensors_of(task), *_tensors_of(batch)]
    trace = LiveBytes(task.model, trainer.strategy.optimizers, existing=existing, first_phase="validation")
    with torch.no_grad(), trace:
        trainer.strategy.validation_step(batch, 0)
    return trace.timeline()


def _tensors_of(holder: Any) -> Sequence[Tensor]:
    """Return the tensors of a batch, or those of a task that are not its model's (metrics)."""
    if isinstance(holder, torch.nn.Module):
        model = {id(tensor) for tensor in (*holder.model.parameters(), *holder.model.buffers())}  # type: ignore[union-attr]
        own = [t for module in holder.modules() for t in vars(module).values() if isinstance(t, Tensor)]
        return [t for t in (*own, *holder.buffers()) if id(t) not in model]
    return list(holder.tensors().values())
