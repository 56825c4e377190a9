"""FSDP2 over the blocks of a model, and a group of devices that are not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from leanbert.errors import UserError
from leanbert.measure.torch_compat import fake_store
from leanbert.models.unit import Unit


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, *, offload: bool = False) -> None:
    """Shard parameters, gradients and optimizer state over `mesh` [N] in place: each block, then what remains.

    A block is gathered before it runs and freed after, forward and backward; what is outside of blocks (embeddings
    and head) stays from the forward to the end of the backward pass (the defaults of `fully_shard`, FSDP2). Over a mesh
    [R, N] there are R replicas, whose gradients are summed. Parameters are gathered in `dtype`, for mixed precision;
    gradients are reduced in float32 then. With `offload` shards are in host memory, as are the gradients and the
    optimizer's state of them, and a device has only what is gathered.

    Raises:
        UserError: Blocks have weights in common.

    """
    owned = [id(parameter) for block in model.blocks for parameter in block.parameters()]  # type: ignore[union-attr]
    if len(owned) > len(set(owned)):
        raise UserError(
            "trainer.strategy: shards block by block, and blocks of this model share weights (model.decoder_start). "
            "Use decoder_start=encoder, or ddp."
        )
    for unit in (*model.blocks, model):  # type: ignore[misc]
        shard_unit(unit, mesh, dtype, offload=offload)
        register_fsdp_forward_method(unit, Unit.with_weights.__name__)
    register_fsdp_forward_method(model, "loss_sum")  # tasks train by it, not by `forward`


def shard_unit(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, *, offload: bool = False) -> None:
    """Shard what is not yet of a module's parameters, which are gathered together; the rest is as of `shard`."""
    # inputs stay as they are: autocast decides in what an operation computes
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    # from page-locked memory, which a CPU has no use for, copies run beside the computation
    place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=place)


def check_groups(devices: int, replicas: int) -> None:
    """Raise UserError if devices do not make as many groups of the same size."""
    if devices % replicas:
        raise UserError(
            f"trainer.strategy.replicas: {devices} devices cannot be divided into {replicas} groups. Give a "
            "divisor of their number."
        )


def lay_out(device_type: str, devices: int, replicas: int, backend: str | None = None) -> DeviceMesh:
    """Return a process group's devices as a mesh [N], or [replicas, N / replicas], whose groups have a `backend`."""
    if replicas == 1:
        return init_device_mesh(device_type, (devices,))
    names = ("replicate", "shard")
    backends: Any = None if backend is None else dict.fromkeys(names, backend)
    shape = (replicas, devices // replicas)
    return init_device_mesh(device_type, shape, mesh_dim_names=names, backend_override=backends)


@contextmanager
def pretend_group(devices: int, replicas: int = 1) -> Iterator[DeviceMesh]:
    """Give a mesh whose collectives do nothing, seen from rank 0, which has the largest shards.

    It is laid out as `lay_out` does.

    Raises:
        UserError: This process is in a process group already, or devices do not make the groups.

    """
    check_groups(devices, replicas)
    if dist.is_initialized():
        raise UserError("plan: this process is part of a distributed run already. Plan in a process of its own.")
    dist.init_process_group("fake", rank=0, world_size=devices, store=fake_store())
    try:
        yield lay_out("cpu", devices, replicas)
    finally:
        dist.destroy_process_group()
