"""Activations that wait for the backward pass on disk or in host memory instead of on the device. Exact."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

SMALLEST_BYTES = 2**16
"""Smaller tensors stay where they are: moving them costs more than it frees."""


def to_host() -> AbstractContextManager[Any]:
    """Keep what autograd saves inside the context in page-locked host memory (`torch.autograd.graph.save_on_cpu`)."""
    return torch.autograd.graph.save_on_cpu(pin_memory=True)


class DiskStorage:
    """Keeps what autograd saves in an unnamed file, read back when the backward pass asks for it.

    The file is written in order and begins anew when nothing in it is waited for, so it is as large as what one
    micro-batch saves. It is read and written, not mapped: mapped pages would count as resident memory.

    Args:
        folder: An existing folder on a disk; the file has no name and is gone with the process.

    """

    def __init__(self, folder: str | Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as the storage
        self._end = 0
        self._waiting = 0
        self._places: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # weak references to storage and _Stored
        self.written_bytes = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Store large tensors that autograd saves inside the context; weights are not stored."""
        self._places.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | _Stored:
        is_weight = isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)
        size = tensor.numel() * tensor.element_size()
        if is_weight or size < SMALLEST_BYTES or tensor.layout != torch.strided:
            return tensor
        # Several operations save the same tensor. It cannot change (autograd checks that), but its memory can be given
        # to another one as soon as it is stored: the storage itself must still be there.
        storage = tensor.untyped_storage()
        key = (id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        owner, stored = (reference() for reference in self._places.get(key, (_nothing, _nothing)))
        if owner is not storage or stored is None:
            stored = self._write(tensor, size)
            self._places[key] = (weakref.ref(storage), weakref.ref(stored))
        return stored

    def _write(self, tensor: Tensor, size: int) -> _Stored:
        if self._waiting == 0:
            self._end = 0
        self._file.seek(self._end)
        self._file.write(_bytes(tensor.detach().contiguous()))
        stored = _Stored(self._end, tensor)
        self._end += size
        self._waiting += 1
        self.written_bytes += size
        weakref.finalize(stored, self._forget)
        return stored

    def _forget(self) -> None:
        self._waiting -= 1

    def _unpack(self, stored: Tensor | _Stored) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        host = torch.empty(stored.shape, dtype=stored.dtype)
        self._file.seek(stored.offset)
        self._file.readinto(_bytes(host))  # type: ignore[attr-defined]
        return host.to(stored.device)


class _Stored:
    """Where a tensor lies in the file, and what it is."""

    def __init__(self, offset: int, tensor: Tensor) -> None:
        self.offset = offset
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device


def _nothing() -> None:
    return None


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, without a copy if it is on the CPU."""
    return tensor.cpu().view(-1).view(torch.uint8).numpy().data
