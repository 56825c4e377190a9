"""What decides the memory of a run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch.callbacks import Callback
from torch.distributed.device_mesh import DeviceMesh

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.data.module import RowData
from leanbert.tasks.base import Task
from leanbert.tasks.techniques import Techniques

Strategy = Literal["auto", "ddp", "fsdp2"]
"""How several devices share a model."""


@dataclass(frozen=True)
class RunSettings:
    """What decides the memory of a run: objects as the command line makes them, none of which holds weights or data."""

    task: Task
    data: RowData
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
    strategy: Strategy = "auto"
    """Of several devices; auto: ddp, but a plan may choose."""
    replicas: int = 1
    """Groups of devices, over each of which fsdp2 shards the model."""
    offload: bool = False
    """Whether fsdp2 has the shards in host memory."""
    mesh: DeviceMesh | None = None
    """`DeviceMesh` of a process group, over which the model is sharded; None: it is whole on each device."""

    def with_encoder(self, **dimensions: Any) -> RunSettings:
        """Return the settings with other dimensions of the encoder."""
        task = copy.deepcopy(self.task)
        task.encoder_config = replace(task.encoder_config, **dimensions)
        return replace(self, task=task)

    @property
    def shards(self) -> bool:
        """Whether the model is sharded, as one device too is if its shards are in host memory."""
        return self.strategy == "fsdp2" and (self.devices > 1 or self.offload)

    @property
    def technique_callbacks(self) -> list[TechniqueCallback]:
        """The callbacks that change what a step needs."""
        return [callback for callback in self.callbacks if isinstance(callback, TechniqueCallback)]

    @property
    def techniques(self) -> Techniques:
        """What the callbacks ask for."""
        asked = Techniques()
        for callback in self.technique_callbacks:
            callback.register(asked)
        return asked

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass on each device."""
        bounds = (self.rows_per_step, self.techniques.micro_batch, self.techniques.slice_rows)
        return min(rows for rows in bounds if rows is not None)

    @property
    def rows_per_step(self) -> int:
        """Sequences of a step on each device."""
        return int(self.rows or self.data.hparams["batch_size"])

    @property
    def validation_rows(self) -> int:
        """Sequences of a validation batch on each device."""
        shared = self.data.hparams["val_batch_size"]
        return -(-shared // self.devices) if shared else self.rows_per_step

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence in a batch."""
        return sum(int(tensor.nbytes) for tensor in self.data.blank_batch(1).tensors().values())
