"""State of an optimizer, whole and in shards.

`torch.distributed.checkpoint.state_dict` does the same for optimizers of torch, which it steps to find out what their
state is, and whose other entries (a count of steps) it drops. Here the state is what the optimizer says, and a file is
the same whatever it was sharded over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.tensor as dtensor
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from leanbert.optim.adamw import MOMENTS, decode_moment, encode_moment
from leanbert.shards import from_own, own, own_rows, rank_of


def gather_state(state: dict[str, Any], optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return state with each sharded tensor whole, on the CPU; all ranks call it together.

    Moments in few bits are coded again: a block that lies on one device has the same codes, one that two devices share
    is rounded once more.

    Args:
        state: What `optimizer.state_dict()` returned.
        optimizer: Whose parameters are sharded, or not.
        keep: Whether this rank wants it; else there is None in place of whole tensors.

    """
    parameters = _parameters(state, optimizer)
    return {**state, "state": {key: _whole(parameters[key], entry, keep) for key, entry in state["state"].items()}}


def shard_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return what `optimizer`, whose parameters are sharded, takes of a whole state: no rank needs another for it.

    Tensors of a parameter's shape are sharded as it is, with one number for each of its rows too, and so are moments in
    few bits; others, such as counts of steps, are each rank's.
    """
    parameters = _parameters(state, optimizer)
    return {**state, "state": {key: _part(parameters.get(key), entry) for key, entry in state["state"].items()}}


def decoded_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return state in which moments of few bits of sharded parameters are float32, in host memory, and sharded as they.

    Whoever loads them codes them again: with the same codes where the parts are the same, and the same scales but for
    the last bit.
    """
    parameters = _parameters(state, optimizer)
    return {**state, "state": {key: _decoded(parameters[key], entry) for key, entry in state["state"].items()}}


def gather(value: Any, *, keep: bool) -> Any:
    """Return a sharded tensor whole, on the CPU, where this rank wants to `keep` it, else None; others as they are."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if keep else None


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor, which each rank has, sharded as a parameter is, if it is; one that is sharded as it is."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    start = own_rows(parameter) * rank_of(parameter)
    part = value[start : start + own_rows(parameter)].to(own(parameter).device, copy=True)
    return from_own(part, parameter, value.shape)


def blank_shards(like: Tensor, mesh: DeviceMesh, *, offload: bool = False) -> DTensor:
    """Return a tensor without values that is sharded over a mesh as parameters are, of the shape of another.

    With `offload` each rank's part is in host memory.
    """
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    found = dtensor.empty(like.shape, dtype=like.dtype, device_mesh=mesh, placements=placements)
    return torch.empty_like(found, device="cpu") if offload else found  # type: ignore[return-value]


def _parameters(state: dict[str, Any], optimizer: Optimizer) -> dict[int, Tensor]:
    saved = [key for group in state["param_groups"] for key in group["params"]]
    known = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return dict(zip(saved, known, strict=False))  # the optimizer says what is wrong with other numbers of them


def _decoded(parameter: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(parameter, DTensor) or entry.get("bits", 32) == 32:
        return entry
    found = {name: value for name, value in entry.items() if not name.startswith(MOMENTS)}
    return found | {name: _moment(parameter, entry, name).cpu() for name in MOMENTS}


def _moment(parameter: Tensor, entry: dict[str, Any], name: str) -> Tensor:
    """Return a moment of few bits as numbers, float32, sharded as its parameter."""
    shape = own(parameter).shape
    return from_own(decode_moment(entry, name, shape.numel()).view(shape), parameter, parameter.shape)


def _whole(parameter: Tensor, entry: dict[str, Any], keep: bool) -> dict[str, Any]:
    found = {name: gather(value, keep=keep) for name, value in entry.items()}
    if isinstance(parameter, DTensor) and entry.get("bits", 32) < 32:
        for name in MOMENTS:
            whole = gather(_moment(parameter, entry, name), keep=keep)
            found.update(encode_moment(whole.view(-1), name, entry["bits"]) if keep else {})
    return found


def _part(parameter: Tensor | None, entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(parameter, DTensor):
        return entry
    found = dict(entry)
    for name, value in entry.items():
        if isinstance(value, Tensor) and value.shape in (parameter.shape, (*parameter.shape[:-1], 1)):
            found[name] = shard_like(value, parameter)
    if entry.get("bits", 32) < 32 and MOMENTS[0] not in entry:
        for name in MOMENTS:
            whole = decode_moment(entry, name, parameter.numel()).view(parameter.shape)
            found.update(encode_moment(own(shard_like(whole, parameter)).reshape(-1), name, entry["bits"]))
    return found
