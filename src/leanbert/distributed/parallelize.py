"""The one order in which a model gets its weights: made and filled, pruned and prepared, sharded.

`fit`, the dry runs of a plan and tests call `parallelize`; nothing else shards a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from leanbert.distributed.sharding import shard
from leanbert.distributed.spread import Spread
from leanbert.measure.torch_compat import forget_passes
from leanbert.models.base import EncoderModel

Model = TypeVar("Model", bound=EncoderModel)


def parallelize(
    make: Callable[[], Model],
    prepare: Callable[[Model], None],
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype | None = None,
    offload: bool = False,
    fill: bool = True,
) -> Model:
    """Return a model with its initial weights, whole or sharded.

    To be sharded it is spread over the ranks from the start (`Spread`): none ever has more of it than its shards and
    the tensors of one operation. Its weights are those of a model that is made on one device of the same kind.

    Args:
        make: Makes the model with its weights, from a seed or from files; alike on all ranks.
        prepare: Does what comes before sharding: structured pruning, activation checkpointing, compilation.
        mesh: Devices to shard over, [N], or to replicate and shard over, [R, N]; None: each has the whole model.
        dtype: In which parameters are gathered; None: in their own.
        offload: Shards are in host memory; see `shard`.
        fill: Whether the shards get weights; a plan needs none.

    Raises:
        UserError: The model cannot be sharded.

    """
    if mesh is None or not fill:
        model = make()
        prepare(model)
        if mesh is not None:
            shard(model, mesh, dtype, offload=offload)
        return model
    with torch.device(mesh.device_type), Spread(mesh, offload=offload) as spread:
        model = make()
        prepare(model)
    shards = {name: spread.shards(parameter) for name, parameter in model.named_parameters()}
    shard(model, mesh, dtype, offload=offload)
    found = {name: each for name, each in shards.items() if each is not None}  # the others `shard` has cut
    model.load_state_dict(found, strict=False, assign=True)
    return model


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Context of backward passes whose gradients wait, whole, on each rank for the next pass that reduces them.

    They are those of all that is sharded in a module.
    """
    parts = _sharded_parts(model)
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def free_gathered(model: nn.Module) -> None:
    """Free what a frozen model, if it is sharded, has gathered for its passes: no backward pass will."""
    if isinstance(model, FSDPModule):
        forget_passes(model)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Context in which each rank has all weights, and may run the model as often as it likes.

    All ranks enter and leave it together, between steps, after a forward pass. Weights are not to be changed inside.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False)
    for part in _sharded_parts(model):
        part.unshard()
    try:
        yield
    finally:
        forget_passes(model)  # shards again; backward passes would gather after what ran here
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)  # as by default: what is outside of blocks stays


def _sharded_parts(model: nn.Module) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]
