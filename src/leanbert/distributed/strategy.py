"""Training on shards under Lightning: FSDP2, alone or replicated, with checkpoints that any number of devices takes."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from leanbert.distributed.shard_writing import ShardWriting
from leanbert.distributed.sharding import check_groups, lay_out
from leanbert.distributed.state import blank_shards, decoded_state, gather, gather_state, shard_state
from leanbert.errors import UserError, require
from leanbert.measure.torch_compat import limit_waiting
from leanbert.ranges import COUNT
from leanbert.shard_files import map_tensors

IN_SHARDS = {"in_shards": True}
"""Storage option of a checkpoint that may be written in shards."""
FREE_MEMORY = 2
"""Free host memory, in copies of all shards of a machine, with which a copy is made to be written in background."""


class FullySharded(ModelParallelStrategy):
    """FSDP2: each device has a part of parameters, gradients and optimizer state (Zhao et al. 2023, arXiv 2304.11277).

    `Task.configure_model` shards over `mesh`, by `parallelize`. From checkpoints any number of devices goes on, with
    any strategy.

    Args:
        replicas: Groups of devices, each of which has the whole model among them: more memory, less to send between
            groups. nodes: as many as there are machines, so that only gradients leave a machine (HSDP).
        checkpoints: whole: one file, as of a single device, which the first device gathers and writes. sharded: those
            to go on from (`step-*.ckpt`) are folders, into which each device writes its part; on a GPU while training
            goes on, if the machine has free memory for two copies. The best is one file always.
        offload: Parameters, gradients and optimizer state are in host memory, and the optimizer steps there; a device
            has what it has gathered, and activations. Gradients of each micro-batch are reduced and sent to the host.
        timeout: How long a device waits for another one that hangs.

    Raises:
        UserError: `replicas` is not positive.

    """

    mesh: DeviceMesh

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        checkpoints: Literal["whole", "sharded"] = "whole",
        offload: bool = False,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if replicas != "nodes":
            COUNT.check("trainer.strategy.replicas", replicas)
        known = checkpoints in ("whole", "sharded")
        require(known, f"trainer.strategy.checkpoints: {checkpoints!r} is unknown. Give whole or sharded.")
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.replicas, self.checkpoints, self.offload = replicas, checkpoints, offload
        self.writing = ShardWriting(lambda rest, path: self.checkpoint_io.save_checkpoint(rest, path))

    def setup_environment(self) -> None:
        """Start the process group, and lay out the devices. Raises UserError if they do not make `replicas` groups."""
        devices = self.num_nodes * self.num_processes
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        check_groups(devices, replicas)
        self._data_parallel_size, self._tensor_parallel_size = devices, 1
        super().setup_environment()
        backend = self._get_process_group_backend() if self.offload else None
        if backend is not None and ":" in backend:
            atexit.register(_destroy_dist_connection)  # as Lightning does for nccl alone
        self.mesh = lay_out(self.root_device.type, devices, replicas, backend)
        if self._timeout is not None:
            for group in self.mesh.get_all_groups():
                limit_waiting(group, self._timeout)

    def _get_process_group_backend(self) -> str:
        """Return what exchanges tensors on the device, and with `offload` those in host memory too."""
        backend, device_type = super()._get_process_group_backend(), self.root_device.type
        both = self.offload and device_type != "cpu" and ":" not in backend
        return f"cpu:gloo,{device_type}:{backend}" if both else backend

    def setup(self, trainer: Trainer) -> None:
        """Make the optimizer. Raises UserError if a weight is whole on each device."""
        assert self.lightning_module is not None
        whole = [name for name, each in self.lightning_module.named_parameters() if not isinstance(each, DTensor)]
        if whole:
            raise UserError(
                f"trainer.strategy: {whole[0]} is not sharded ({len(whole)} in all), for configure_model does not "
                "build it with leanbert.distributed.parallelize. Use ddp."
            )
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move what is not in shards, such as metrics, to the device, where shards are unless they are offloaded."""
        assert self.lightning_module is not None
        self.lightning_module._apply(lambda each: each if isinstance(each, DTensor) else each.to(self.root_device))
        _update_properties(self.lightning_module, device=self.root_device)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the shards are there before the optimizer, as whole weights are."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: by `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the whole file, memory-mapped, on each rank; of a checkpoint in shards each rank's part of tensors."""
        place = partial(blank_shards, mesh=self.mesh, offload=self.offload)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location=place)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of weights."""
        assert self.lightning_module is not None
        weights = dict(checkpoint["state_dict"])
        whole = not any(isinstance(weight, DTensor) for weight in weights.values())
        options = StateDictOptions(full_state_dict=whole, strict=strict)
        set_model_state_dict(self.lightning_module, weights, options=options)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights in shards; `save_checkpoint` gathers them where they are to be whole."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state in shards, as `lightning_module_state_dict` does the weights."""
        return _inner(optimizer).state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: dict[str, bool] | None = None
    ) -> None:
        """Write one file on the first rank; with the option `IN_SHARDS`, if it is asked for, shards on all.

        Those may be written in the background: `writing` says when they are whole, before the next are written.

        Raises:
            UserError: The disk is full.

        """
        optimizers = [_inner(optimizer) for optimizer in self.optimizers]
        states = list(zip(checkpoint.get("optimizer_states", ()), optimizers, strict=False))
        if storage_options == IN_SHARDS and self.checkpoints == "sharded":
            checkpoint["optimizer_states"] = [decoded_state(*each) for each in states]
            self.writing.start(checkpoint, Path(filepath), self.mesh, self._may_copy)
            return
        keep = self.is_global_zero
        if states:
            checkpoint["optimizer_states"] = [gather_state(*each, keep=keep) for each in states]
        Strategy.save_checkpoint(self, map_tensors(lambda _, each: gather(each, keep=keep), checkpoint), filepath)

    def _may_copy(self, size_bytes: int) -> bool:
        """Return whether host memory is free for copies; never on a CPU, whose memory is what training uses."""
        needed = FREE_MEMORY * self.num_processes * size_bytes
        return self.root_device.type != "cpu" and needed < psutil.virtual_memory().available

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of state, to where the parameters are."""
        for state, optimizer in zip(checkpoint["optimizer_states"], self.optimizers, strict=True):
            optimizer.load_state_dict(shard_state(state, optimizer))


def _inner(optimizer: Optimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
