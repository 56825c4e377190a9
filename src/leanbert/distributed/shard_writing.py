"""Checkpoints in shards, as they are written: each rank its own parts, in the background where memory allows.

What comes out is described in `leanbert.shard_files`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from leanbert import signals
from leanbert.files import REST, explain_disk_errors, temporary
from leanbert.shard_files import FILES, SUFFIX, map_tensors
from leanbert.shards import own

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of types in files of safetensors."""


class ShardWriting:
    """Writes checkpoints in shards, one after the other.

    Args:
        save_rest: Writes what is no shard to a file.

    """

    def __init__(self, save_rest: Callable[[dict[str, Any], Path], None]) -> None:
        self._save_rest = save_rest
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # which Python waits for when it ends
        self._group: Any = None
        self._written: Future[None] | None = None

    def start(self, checkpoint: dict[str, Any], path: Path, mesh: DeviceMesh, may_copy: Callable[[int], bool]) -> None:
        """Write a checkpoint, all ranks together: now, or in the background a copy in host memory.

        Args:
            checkpoint: Nested values, of which sharded tensors are written by the ranks that have them, and the rest
                by the first.
            path: The folder that comes to be when all is written.
            mesh: Devices that the tensors are sharded over, [N], or [R, N]: each of R replicas writes some.
            may_copy: Whether this rank may copy so many bytes into host memory.

        Raises:
            UserError: The disk is full.

        """
        if self._group is None:  # not that of training: exchanges of two threads in one group would meet
            self._group = dist.new_group(backend="gloo")
        shards: dict[str, Tensor] = {}
        rest = map_tensors(lambda place, tensor: _set_aside(place, tensor, shards), checkpoint)
        if mesh.ndim > 1:
            replica, replicas = mesh.get_local_rank(0), mesh.size(0)
            shards = {name: shards[name] for index, name in enumerate(shards) if index % replicas == replica}
        if may_copy(sum(own(shard).nbytes for shard in shards.values())):
            rest = copy.deepcopy(rest)
            copies = {name: shard.to("cpu", copy=True) for name, shard in shards.items()}
            self._written = self._thread.submit(self._write, copies, rest, path)
        else:
            self._write(shards, rest, path)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._written is not None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `finish` says why."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint that was started last is whole. Raises UserError if the disk is full."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _write(self, shards: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
        first = dist.get_rank() == 0
        with explain_disk_errors(path.parent, "--trainer.default_root_dir"), _building(path, first) as building:

            def complete(files: dict[str, list[int]]) -> None:
                self._save_rest({**rest, FILES: files}, building / REST)
                signals.remove(path)
                os.replace(building, path)

            try:
                dcp.save(
                    shards,
                    storage_writer=_Writer(building, complete),
                    planner=dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=self._group,
                )
            except CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from None


def _building(path: Path, first: bool) -> Any:
    """Return the context in which the first rank has a name for what is to be at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return temporary(path) if first else nullcontext(path)


def _set_aside(place: str, tensor: Tensor, shards: dict[str, Tensor]) -> Tensor:
    """Put a sharded tensor among the others, and return one on the meta device in its place; return others."""
    if not isinstance(tensor, DTensor):
        return tensor
    shards[place] = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


class _Writer(StorageWriter):
    """Writes a file of each rank into a folder, and has the first rank complete it.

    torch's own writer of such files, `HuggingFaceStorageWriter`, has a file in memory three times.

    Args:
        folder: What the first rank makes; others are told.
        complete: Called on the first rank with size and CRC-32 of each file when all are written.

    """

    def __init__(self, folder: Path, complete: Callable[[dict[str, list[int]]], None]) -> None:
        self._folder, self._complete = folder, complete

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: each checkpoint has a writer of its own."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the folder and return the plans with the files."""
        self._folder.mkdir()
        files = (self._folder / f"{number:05d}{SUFFIX}" for number in range(len(plans)))
        return [replace(plan, storage_data=file) for plan, file in zip(plans, files, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write this rank's file."""
        parts: dict[str, TensorWriteData] = {}
        tensors = []
        for item in plan.items:
            if item.tensor_data is not None and item.tensor_data.chunk.sizes.numel():  # a rank may have no rows
                parts[item.index.fqn] = item.tensor_data
                tensors.append(planner.resolve_data(item))
        size, checksum = write_parts(plan.storage_data, parts, tensors)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([WriteResult(MetadataIndex(plan.storage_data.name), size, checksum)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the folder."""
        self._complete({each.index.fqn: [each.size_in_bytes, each.storage_data] for [each] in results})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return False: it is not chosen by names."""
        return False


def write_parts(path: Path, parts: Mapping[str, TensorWriteData], tensors: Iterable[Any]) -> tuple[int, int]:
    """Write parts of tensors to a file of safetensors, one at a time; return its bytes and its CRC-32.

    The format is that of github.com/huggingface/safetensors, with offsets in the whole tensors as
    `torch.distributed.checkpoint.HuggingFaceStorageReader` reads them.
    """
    places = {name: {"saved_offsets": list(part.chunk.offsets)} for name, part in parts.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)}}
    start = 0
    for name, part in parts.items():
        shape, dtype = list(part.chunk.sizes), part.properties.dtype
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksum = 0
    with path.open("wb") as file:
        for piece in _pieces(text, tensors):
            file.write(piece)
            checksum = zlib.crc32(piece, checksum)
        file.flush()
        os.fsync(file.fileno())
        return file.tell(), checksum


def _pieces(header: bytes, tensors: Iterable[Any]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        yield memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
