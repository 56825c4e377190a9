"""The one order in which a model gets its weights: made, pruned and prepared, sharded, and then filled.

`fit`, the dry runs of a plan and tests call `parallelize`; nothing else shards a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from leanbert.distributed.sharding import shard
from leanbert.models.base import EncoderModel

Model = TypeVar("Model", bound=EncoderModel)


def parallelize(
    make: Callable[[], Model],
    prepare: Callable[[Model], None],
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype | None = None,
    fill: bool = True,
) -> Model:
    """Return a model with its initial weights, whole or sharded.

    To be sharded it is made with values on the first rank only, in host memory, and elsewhere on the meta device: no
    rank ever has more of it on its device than its shards and one tensor.

    Args:
        make: Makes the model with its weights, from a seed or from files.
        prepare: Does what comes before sharding: structured pruning, activation checkpointing, compilation.
        mesh: Devices to shard over, [N], or to replicate and shard over, [R, N]; None: each has the whole model.
        dtype: In which parameters are gathered; None: in their own.
        fill: Whether the shards get weights; a plan needs none.

    Raises:
        UserError: The model cannot be sharded.

    """
    blank = mesh is not None and fill and dist.get_rank() > 0
    with torch.device("meta") if blank else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*copying from a non-meta parameter")  # weights that stay behind
        model = make()
        prepare(model)
    if mesh is None:
        return model
    if not fill:
        shard(model, mesh, dtype)
        return model
    weights, buffers = ({}, {}) if blank else (model.state_dict(), dict(model.named_buffers()))
    model.to("meta")
    shard(model, mesh, dtype)
    model.to_empty(device=mesh.device_type)
    _fill(model, weights, buffers)
    return model


def _fill(model: nn.Module, weights: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    """Give all ranks what the first one has, a tensor at a time."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.named_buffers():  # those that no checkpoint has, too
        if buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


@contextmanager
def unreduced(model: FSDPModule) -> Iterator[None]:
    """Context of backward passes whose gradients wait, whole, on each rank for the next pass that reduces them."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which each rank has all weights, and may run the model as often as it likes.

    All ranks enter and leave it together, between steps, after a forward pass. Weights are not to be changed inside.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    model.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        model.reset_iter_state()  # shards again; and forgets the passes, which backward passes would gather after
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)  # as by default: what is outside of blocks stays
