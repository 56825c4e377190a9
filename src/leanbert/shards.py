"""This device's part of a tensor that is sharded, along its first dimension, as FSDP2 shards parameters."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def own(tensor: Tensor) -> Tensor:
    """Return the part that is on this device, of the same memory, or a tensor that is not sharded."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> int:
    """Return how many rows each device has, but the last ones, which may have fewer; of a whole tensor all."""
    if not isinstance(tensor, DTensor):
        return tensor.shape[0]
    return -(-tensor.shape[0] // tensor.device_mesh.size(tensor.placements.index(Shard(0))))


def own_start(tensor: Tensor) -> int:
    """Return how many elements of the whole tensor come before this device's part."""
    if not isinstance(tensor, DTensor) or tensor.numel() == 0:
        return 0
    place = tensor.device_mesh.get_local_rank(tensor.placements.index(Shard(0)))
    return min(own_rows(tensor) * place, tensor.shape[0]) * (tensor.numel() // tensor.shape[0])


def sum_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """Return a value summed over the devices that together have `like`; of a whole tensor this device's, as it is."""
    if isinstance(like, DTensor):
        value = value.clone()
        dist.all_reduce(value, group=like.device_mesh.get_group(like.placements.index(Shard(0))))
    return value


def from_own(part: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """Return the tensor of `shape` of which each device has such a part, sharded as `like` is; else `part`."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=part.stride()
    )


def counts_before(count: int, like: Tensor) -> tuple[int, int]:
    """Return the sums of a count over the devices with earlier parts of `like`, and over all with parts of it."""
    if not isinstance(like, DTensor):
        return 0, count
    dimension = like.placements.index(Shard(0))
    place = like.device_mesh.get_local_rank(dimension)
    counts = torch.zeros(like.device_mesh.size(dimension), dtype=torch.int64, device=own(like).device)
    counts[place] = count
    counts = sum_over_shards(counts, like)
    return int(counts[:place].sum()), int(counts.sum())
