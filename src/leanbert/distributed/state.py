"""State of an optimizer, whole and in shards.

`torch.distributed.checkpoint.state_dict` does the same for optimizers of torch, which it steps to find out what their
state is, and whose other entries (a count of steps) it drops. Here the state is what the optimizer says, and a file is
the same whatever it was sharded over.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def gather_state(state: Any, *, keep: bool) -> Any:
    """Return nested state with each sharded tensor whole, on the CPU; all ranks call it together.

    Args:
        state: What `Optimizer.state_dict` returns.
        keep: Whether this rank wants it; else there is None in place of whole tensors.

    """
    if isinstance(state, dict):
        return {key: gather_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value, keep=keep) for value in state)
    if isinstance(state, DTensor):
        whole = state.full_tensor()  # one at a time
        return whole.cpu() if keep else None
    return state


def shard_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return what `optimizer`, whose parameters are sharded, takes of a whole state: no rank needs another for it.

    Tensors of a parameter's shape are sharded as it is; others, such as counts of steps, are each rank's.
    """
    saved = [key for group in state["param_groups"] for key in group["params"]]
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = dict(zip(saved, own, strict=False))  # the optimizer says what is wrong with other numbers of them
    return {**state, "state": {key: _like(parameters.get(key), entry) for key, entry in state["state"].items()}}


def _like(parameter: Tensor | None, entry: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(parameter, DTensor):
        return entry
    mesh, placements = parameter.device_mesh, parameter.placements
    return {
        name: distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in entry.items()
    }
