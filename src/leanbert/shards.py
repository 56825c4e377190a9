"""This device's part of a tensor that is sharded, along its first dimension, as FSDP2 shards parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def own(tensor: Tensor) -> Tensor:
    """Return the part that is on this device, of the same memory, or a tensor that is not sharded."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def shards_of(tensor: Tensor) -> int:
    """Return over how many devices a tensor is sharded; a whole one 1."""
    return tensor.device_mesh.size(_dimension(tensor)) if isinstance(tensor, DTensor) else 1


def own_rows(tensor: Tensor) -> int:
    """Return how many rows each device has, but the last ones, which may have fewer; of a whole tensor all."""
    return -(-tensor.shape[0] // shards_of(tensor))


def rank_of(tensor: DTensor) -> int:
    """Return this device's place among those that a tensor is sharded over."""
    return tensor.device_mesh.get_local_rank(_dimension(tensor))


def own_start(tensor: Tensor) -> int:
    """Return how many elements of the whole tensor come before this device's part."""
    if not isinstance(tensor, DTensor) or tensor.numel() == 0:
        return 0
    return min(own_rows(tensor) * rank_of(tensor), tensor.shape[0]) * (tensor.numel() // tensor.shape[0])


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Return a value summed over the devices that together have `like`; of a whole tensor this device's, as it is."""
    if isinstance(like, DTensor):
        value = value.clone()
        dist.all_reduce(value, group=like.device_mesh.get_group(_dimension(like)))
    return value


def from_own(part: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor of `shape` of which each device has such a part, sharded as `like` is; else `part`.

    A part in host memory stays there.
    """
    if not isinstance(like, DTensor):
        return part
    mesh = like.device_mesh
    host = part.device.type == "cpu" and mesh.device_type != "cpu"
    given = part.to("meta") if host else part  # which would be moved to the mesh's device
    found = DTensor.from_local(given, mesh, like.placements, run_check=False, shape=shape, stride=part.stride())
    if host:
        found = torch.empty_like(found, device="cpu")  # type: ignore[assignment]
        own(found).copy_(part)
    return found


def counts_before(count: int, like: Tensor) -> tuple[int, int]:
    """Return the sums of a count over the devices with earlier parts of `like`, and over all with parts of it."""
    if not isinstance(like, DTensor):
        return 0, count
    place = rank_of(like)
    counts = torch.zeros(shards_of(like), dtype=torch.int64, device=own(like).device)
    counts[place] = count
    counts = sum_over_shards(counts, like)
    return int(counts[:place].sum()), int(counts.sum())


def map_whole(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return this device's part of what `function` makes of each sharded matrix, which one device sees whole.

    Matrix number n is device n's; there are not more of them than devices. What is made has the matrix's shape, and
    `dtype`.
    """
    first = tensors[0]
    assert isinstance(first, DTensor)
    group = first.device_mesh.get_group(_dimension(first))
    place, ranks = dist.get_rank(group), shards_of(first)
    pieces: list[Tensor] = []
    for owner, tensor in enumerate(tensors):  # all parts of a tensor are padded to the first one's rows
        part = _padded(own(tensor), own_rows(tensor))
        gathered = [torch.empty_like(part) for _ in range(ranks)] if owner == place else None
        dist.gather(part, gathered, group=group, group_dst=owner)
        pieces = gathered or pieces
    made: list[Tensor] = []
    if place < len(tensors):
        mine = tensors[place]
        whole = function(torch.cat(pieces)[: mine.shape[0]])
        made = [piece.contiguous() for piece in _padded(whole, ranks * own_rows(mine)).chunk(ranks)]
    found = []
    for owner, tensor in enumerate(tensors):
        part = own(tensor)
        into = part.new_empty(own_rows(tensor), *tensor.shape[1:], dtype=dtype)
        dist.scatter(into, made if owner == place else None, group=group, group_src=owner)
        found.append(into[: len(part)])
    return found


def _dimension(tensor: DTensor) -> int:
    """Return the dimension of its mesh over which a tensor is sharded; over others it is replicated."""
    return tensor.placements.index(Shard(0))


def _padded(tensor: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, rows - len(tensor)))
