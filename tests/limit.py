"""A stand-in for a device with little memory."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocatorLimit(TorchDispatchMode):
    """Raises `torch.OutOfMemoryError` when what operations have made inside the context is above `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.live_bytes = self.peak_bytes = self.raised = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return

        def freed(_):
            self._seen.pop(key, None)
            self.live_bytes -= size

        self._seen[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        if self.live_bytes > self.limit_bytes:
            self.raised += 1
            raise torch.OutOfMemoryError(f"limit of {self.limit_bytes} bytes: {self.live_bytes} wanted")
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
