"""Weights of which each rank has its rows from the start, while a model is made, filled and pruned.

As with `deferred_init` of torchdistX, the code that makes a model need not know of it. Here nothing is written down to
be done later: each operation runs at once, on whole tensors that are there for as long as it takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from leanbert.distributed.state import blank_shards
from leanbert.measure.torch_compat import TorchDispatchMode, tensors_in, tree_map_only
from leanbert.shards import own, own_rows, own_start

aten = torch.ops.aten
EMPTY, COPY = aten.empty.memory_format, aten.copy_.default
OVERWRITES = (aten.normal_.default, aten.uniform_.default, aten.fill_.Scalar, aten.zero_.default)
"""Operations that change a tensor and read none."""
META = torch.device("meta")


class Spread(TorchDispatchMode):
    """Context in which tensors that `torch.empty` makes, as modules make their weights, are spread over ranks.

    To what runs inside they are on the meta device. An operation on them runs on all ranks alike: what it reads is
    gathered, and of what it has changed or made each rank keeps its rows. So weights are drawn, loaded and pruned by
    the same operations as on one device, random numbers included, and are the same bit by bit. Tensors that other
    functions make of none of them (`torch.arange`, a file) are whole, and each rank's own.

    Args:
        mesh: Devices [N] that rows are spread over, or [R, N] with the same rows R times.
        offload: Rows wait in host memory; operations run on the devices all the same.

    """

    def __init__(self, mesh: DeviceMesh, *, offload: bool = False) -> None:
        super().__init__()
        self._mesh, self._offload = mesh, offload
        self._parts: WeakKeyDictionary[torch.UntypedStorage, DTensor] = WeakKeyDictionary()

    def shards(self, tensor: Tensor) -> DTensor | None:
        """Return a tensor that is spread, as FSDP2 shards it; None of one that is not."""
        return self._parts.get(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_meta, given = kwargs.get("device") == META, tensors_in((args, kwargs))
        if func is EMPTY:  # without elements it will be given memory, such as a file's
            plain = to_meta or 0 in args[0]
            return func(*args, **kwargs) if plain else self._add(func(*args, **{**kwargs, "device": META}))
        if to_meta and not any(tensor.is_meta for tensor in given):  # the device of a spread tensor was asked for
            return self._run(func, args, {**kwargs, "device": self._mesh.device_type}, spreads=True)
        views = func.is_view or torch.Tag.inplace_view in func.tags
        if views or not any(tensor.untyped_storage() in self._parts for tensor in given):
            return func(*args, **kwargs)
        return self._run(func, args, kwargs, spreads=kwargs.get("device") is None)

    def _run(self, func: Any, args: Any, kwargs: Any, *, spreads: bool) -> Any:
        """Run an operation on whole tensors; keep this rank's rows of what it changes, and `spreads` what it makes."""
        wholes: dict[torch.UntypedStorage, Tensor] = {}
        stand_ins: dict[int, tuple[Tensor, Tensor]] = {}

        def whole(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage not in self._parts:
                return tensor
            if storage not in wholes:
                wholes[storage] = self._whole(
                    self._parts[storage], gather=func not in OVERWRITES or not self._is_all(tensor)
                )
            found = wholes[storage].view(tensor.dtype)
            found = found.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            stand_ins[id(found)] = found, tensor
            return found

        def spread(tensor: Tensor) -> Tensor:
            if id(tensor) in stand_ins:
                return stand_ins[id(tensor)][1]
            return self._add(torch.empty(tensor.shape, dtype=tensor.dtype, device=META), tensor) if spreads else tensor

        if func is COPY and self._is_all(args[0]) and args[0].shape == args[1].shape:  # a rank needs its rows alone
            self._keep(self._parts[args[0].untyped_storage()], whole(args[1]))
            return args[0]
        result = func(*tree_map_only(Tensor, whole, args), **tree_map_only(Tensor, whole, kwargs))
        for storage, changed in wholes.items() if func._schema.is_mutable else ():
            self._keep(self._parts[storage], changed)
        return tree_map_only(Tensor, spread, result)

    def _is_all(self, tensor: Tensor) -> bool:
        """Return whether a tensor is all of a spread one, and not some rows or columns of it."""
        part = self._parts.get(tensor.untyped_storage())
        return part is not None and tensor.is_contiguous() and tensor.numel() == part.shape.numel()

    def _add(self, tensor: Tensor, whole: Tensor | None = None) -> Tensor:
        """Return a tensor on the meta device, which is spread from now on, with these values or any."""
        part = blank_shards(tensor.view(tensor.shape or (1,)), self._mesh, offload=self._offload)
        self._parts[tensor.untyped_storage()] = part
        if whole is not None:
            self._keep(part, whole)
        return tensor

    def _keep(self, part: DTensor, whole: Tensor) -> None:
        """Keep this rank's rows of a whole tensor, which may have another shape."""
        rows, start = own(part), own_start(part)
        rows.copy_(whole.reshape(-1)[start : start + rows.numel()].view(rows.shape))

    def _whole(self, part: DTensor, *, gather: bool) -> Tensor:
        """Return a whole tensor, with its values if it is to `gather` them; `full_tensor` would need twice as much."""
        whole = torch.empty(part.shape, dtype=part.dtype, device=self._mesh.device_type)
        last = self._mesh.ndim - 1
        for owner, rows in enumerate(whole.split(own_rows(part)) if gather else ()):
            if owner == self._mesh.get_local_rank(last):
                rows.copy_(own(part))
            dist.broadcast(rows, group=self._mesh.get_group(last), group_src=owner)
        return whole
