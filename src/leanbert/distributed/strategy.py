"""Training on shards under Lightning: FSDP2, alone or replicated, with checkpoints as of a single device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from leanbert.distributed.sharding import check_groups, lay_out
from leanbert.distributed.state import gather_state, shard_state
from leanbert.errors import UserError
from leanbert.ranges import COUNT


class FullySharded(ModelParallelStrategy):
    """FSDP2: each device has a part of parameters, gradients and optimizer state (Zhao et al. 2023, arXiv 2304.11277).

    `Task.configure_model` shards over `mesh`, by `parallelize`. Checkpoints are one file, as of a single device, from
    which any number of devices goes on, with any strategy.

    Args:
        replicas: Groups of devices, each of which has the whole model among them: more memory, less to send between
            groups. nodes: as many as there are machines, so that only gradients leave a machine (HSDP).

    Raises:
        UserError: `replicas` is not positive.

    """

    mesh: DeviceMesh

    def __init__(self, replicas: int | Literal["nodes"] = 1) -> None:
        if replicas != "nodes":
            COUNT.check("trainer.strategy.replicas", replicas)
        super().__init__(save_distributed_checkpoint=False)
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Start the process group, and lay out the devices. Raises UserError if they do not make `replicas` groups."""
        devices = self.num_nodes * self.num_processes
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        check_groups(devices, replicas)
        self._data_parallel_size, self._tensor_parallel_size = devices, 1
        super().setup_environment()
        self.mesh = lay_out(self.root_device.type, devices, replicas)

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

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the shards are there before the optimizer, as whole weights are."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: by `load_optimizer_state_dict`."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the whole file, memory-mapped, on each rank."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of whole weights."""
        assert self.lightning_module is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state on the first rank, where weights and state are written."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return gather_state(inner.state_dict(), inner, keep=self.is_global_zero)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of whole state."""
        states = checkpoint["optimizer_states"]
        parts = [shard_state(state, each) for state, each in zip(states, self.optimizers, strict=True)]
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": parts})
