"""All names of torch that its documentation does not promise: what another version of torch breaks, breaks here.

LeanBERT runs with torch 2.11 to 2.13, which have them all; the number behind a name is the version that brought it. Of
other modules only attributes of operators and tensors (`_schema`, `_opname`, `_is_view`, `_version`) are private.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._ops import OpOverload  # 1.11: one operation, as a dispatch mode is given it
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # 1.13, 2.1: dry runs
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState  # 2.6
from torch.distributed.tensor._sharding_prop import ShardingPropagator  # 2.5: what DTensor derives of an operation
from torch.utils._python_dispatch import (
    TorchDispatchMode,  # 1.13: traces
    _disable_current_modes,  # 2.1
    is_traceable_wrapper_subclass,  # 2.1
)
from torch.utils._pytree import tree_map_only  # 1.13
from torch.utils.hooks import RemovableHandle

__all__ = [
    "FakeTensor", "FakeTensorMode", "OpOverload", "TorchDispatchMode", "compiled", "cpu_computes_bf16",
    "cpu_computes_int8", "dispatch_keys", "fake_store", "forget_passes", "group_of", "in_backward_pass",
    "keep_cuda_history", "limit_waiting", "runs_first", "shapes_unseen", "tensors_in", "tree_map_only",
    "unset_fake_temporarily", "unwrapped", "wraps_tensors", "write_cuda_history",
]  # fmt: skip


def in_backward_pass() -> bool:
    """Return whether autograd runs this, `_current_graph_task_id` (2.0); it has no public sign of that."""
    return torch._C._current_graph_task_id() != -1


def runs_first(handle: RemovableHandle, parameter: Tensor) -> None:
    """Let a hook on a parameter's gradient run before the others, `_post_accumulate_grad_hooks` (2.1)."""
    hooks: dict[int, object] = parameter._post_accumulate_grad_hooks
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)


def dispatch_keys(tensor: Tensor) -> int:
    """Return all that operations go by but type and shape, `_dispatch_keys` (1.13): device, layout, conjugation, ..."""
    return torch._C._dispatch_keys(tensor).raw_repr()


def unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, or the inner ones of a wrapper, `__tensor_flatten__` (2.1); of a DTensor, not its mesh."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(inner := getattr(tensor, name), Tensor):
            yield from unwrapped(inner)


def wraps_tensors(types: Iterable[type]) -> bool:
    """Return whether an operation is on wrappers: a mode returns NotImplemented, and is given the inner ones."""
    return any(hasattr(kind, "__tensor_flatten__") for kind in types)


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation; `torch.utils._pytree` is many times slower."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        if isinstance(inner, Tensor):
            found.append(inner)
        elif isinstance(inner, list | tuple | dict):
            found += tensors_in(inner)
    return found


def group_of(arguments: tuple[Any, ...]) -> dist.ProcessGroup:
    """Return the devices that a collective's arguments name: a group, `unbox` (2.1), or at last its name (2.1)."""
    if isinstance(arguments[-1], str):
        return dist.distributed_c10d._resolve_process_group(arguments[-1])  # type: ignore[arg-type]
    boxed = next(each for each in arguments if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each))
    return dist.ProcessGroup.unbox(boxed)


def limit_waiting(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Limit how long a group's devices wait for one another, `_set_pg_timeout` (2.1); a mesh makes its own groups."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextmanager
def shapes_unseen() -> Iterator[None]:
    """Context in which no mode sees the fake tensors by which DTensor finds the shape of a result.

    By `ShardingPropagator._propagate_tensor_meta_non_cached` (2.9), once for operation and shapes.
    """
    find = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(*arguments: Any) -> Any:
        with _disable_current_modes():
            return find(*arguments)

    ShardingPropagator._propagate_tensor_meta_non_cached = unseen  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = find  # type: ignore[method-assign]


def forget_passes(model: FSDPModule) -> None:
    """Free what a sharded model has gathered for forward passes that no backward pass follows: `reset_iter_state`.

    It came with torch 2.13; before, by what it is made of (2.6).
    """
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        return
    state: Any = model._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for each in state._state_ctx.all_states:
        each._training_state = TrainingState.IDLE
        if (group := each._fsdp_param_group) is not None:
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()


def compiled(module: nn.Module) -> bool:
    """Return whether `Module.compile` was called, or torch.compile made it: `_compiled_call_impl` (2.2)."""
    return getattr(module, "_compiled_call_impl", None) is not None


def cpu_computes_bf16() -> bool:
    """Return whether the CPU has bf16 instructions, which torch.cpu knows (2.6) and does not say."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def cpu_computes_int8() -> bool:
    """Return whether the CPU has instructions for sums of products of 8 bits, which torch.cpu knows (2.6)."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_vnni_supported", "_is_amx_tile_supported"))


def keep_cuda_history(events: int | None) -> None:
    """Keep the last allocations and frees on CUDA, `_record_memory_history` (2.1); None: stop."""
    if events is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=events)


def write_cuda_history(path: str) -> None:
    """Write what was kept as a pickle for https://pytorch.org/memory_viz, `_dump_snapshot` (2.1)."""
    torch.cuda.memory._dump_snapshot(path)


def fake_store() -> dist.Store:
    """Return a store of the process group "fake" (2.1), whose collectives do nothing; to import it registers that."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
