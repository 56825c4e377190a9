"""Checkpoints in shards, as they are read: a folder with a file from each rank that wrote it, and one with the rest.

The rest is a checkpoint like any other, in which tensors on the meta device stand for those that lie in shards, under
the names of their places in it, and a table has size and CRC-32 of each file. Shards are files of safetensors, which
cannot carry code. `torch.distributed.checkpoint` finds in them the parts that a process asks for, whoever wrote them.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from leanbert import untrusted
from leanbert.errors import UserError, tells_of_lost_rank
from leanbert.files import REST

FILES = "shards"
"""Entry of the rest: the files of shards, by name, each with its bytes and its CRC-32."""
SUFFIX = ".safetensors"
PIECE_BYTES = 2**20


class Reader(dcp.HuggingFaceStorageReader):
    """Reads parts of tensors from the shards in a folder, and what is in which file only once."""

    def read_metadata(self) -> Metadata:
        """Return where which part is."""
        return self._places

    @cached_property
    def _places(self) -> Metadata:
        return super().read_metadata()


def holds_shards(path: Path) -> bool:
    """Return whether there is a checkpoint in shards at a path."""
    return (path / REST).is_file()


def map_tensors(function: Callable[[str, Tensor], Any], value: Any, place: str = "") -> Any:
    """Return nested dictionaries and lists with what `function` makes of each tensor and its place, keys with dots."""
    if isinstance(value, Tensor):
        return function(place, value)
    if isinstance(value, dict):
        return {key: map_tensors(function, part, f"{place}.{key}".lstrip(".")) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, part, f"{place}.{index}") for index, part in enumerate(value))
    return value


def read_rest(path: Path, fix: str) -> Any:
    """Read what is no shard; a tensor that lies in shards is on the meta device.

    Raises `UserError`, ending with `fix`, if a file is missing or of another size, or the rest is damaged.
    """
    rest = untrusted.load_pickled(path / REST, fix)
    try:
        sizes = {str(name): int(size) for name, (size, _) in rest[FILES].items()}
    except Exception:  # as whatever else it may hold raises
        raise UserError(f"{path}: damaged, {REST} does not say what belongs to it. {fix}") from None
    there = {file.name: file.stat().st_size for file in path.glob(f"*{SUFFIX}")}
    if wrong := sorted(name for name in {*sizes, *there} if sizes.get(name) != there.get(name)):
        raise UserError(f"{path / wrong[0]}: damaged, of {there.get(wrong[0], 0)} bytes. {fix}")
    return rest


def check_sums(path: Path, fix: str) -> None:
    """Compare all files with their checksums, a piece at a time. Raises `UserError`, ending with `fix`."""
    untrusted.check_sums(path / REST, fix)
    for name, (_, checksum) in read_rest(path, fix)[FILES].items():
        found = 0
        with (path / name).open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                found = zlib.crc32(piece, found)
        if found != checksum:
            raise UserError(f"{path / name}: damaged. {fix}")


def fill(
    path: Path, rest: Any, fix: str, place: Callable[[Tensor], Tensor] | None = None, reader: Reader | None = None
) -> Any:
    """Return the rest, or a part of it, with the tensors that lie in shards in place of those on the meta device.

    Args:
        path: The folder.
        rest: What `read_rest` returned, less what is not wanted; keys are those of the whole.
        fix: What to do about damaged files.
        place: Makes the tensor that the values of one on the meta device are read into: the whole one, or a sharded
            one, of which each rank reads its part; all ranks call this together then. None: whole, on the CPU.
        reader: What has read from the folder before.

    Raises:
        UserError: A file is damaged, or the rest is of other shards.
        RuntimeError: Another rank was lost meanwhile.

    """
    make = place or (lambda blank: torch.empty_like(blank, device="cpu"))
    wanted: dict[str, Any] = {}

    def fetch(name: str, tensor: Tensor) -> Tensor:
        return wanted.setdefault(name, make(tensor)) if tensor.is_meta else tensor

    filled = map_tensors(fetch, rest)
    whole = not any(isinstance(tensor, DTensor) for tensor in wanted.values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(
                wanted,
                storage_reader=reader or Reader(str(path)),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=whole,
            )
    except (Exception, CheckpointException) as error:  # as whatever a header says may raise
        if tells_of_lost_rank(error):
            raise
        raise UserError(f"{path}: damaged, its shards do not make the tensors of {REST}. {fix}") from error
    return filled
