"""An accelerator that is not there: tensors on it have no values, and cannot be mixed with those of the host.

Imported by a process of its own: torch has one such device. Its streams and events do nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg
from torch.utils import backend_registration

from leanbert.distributed.sharding import lay_out
from leanbert.planning.fake import Fake

NAME = "pretended"


class _Stream:
    def __init__(self, **_):
        pass

    def record_event(self):
        return _Event()

    def wait_stream(self, _):
        pass

    wait_event = wait_stream


class _Event:
    def record(self):
        return self

    def synchronize(self):
        pass


_MODULE = SimpleNamespace(
    Stream=_Stream, Event=_Event, stream=lambda _: contextlib.nullcontext(), current_stream=_Stream,
    current_device=lambda: 0, device_count=lambda: 1, is_available=lambda: True, is_initialized=lambda: True,
    _is_in_bad_fork=lambda: False, manual_seed_all=lambda _: None,
)  # fmt: skip
_pinned: WeakSet[torch.UntypedStorage] = WeakSet()


def _pin(tensor):
    found = tensor.clone()
    _pinned.add(found.untyped_storage())
    return found


def register() -> None:
    """Make the device known, and page-locked memory, which tensors without values do not have."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _MODULE)
    dist.Backend.register_backend("fake", fake_pg._create_fake_pg, extended_api=True, devices=["cpu", NAME])
    torch.Tensor.pin_memory = _pin
    torch.Tensor.is_pinned = lambda tensor: tensor.untyped_storage() in _pinned


@contextlib.contextmanager
def accelerators(count: int, replicas: int) -> Iterator[dist.DeviceMesh]:
    """Give a mesh of them, on which tensors are made from now on, seen from rank 0."""
    backend = f"cpu:fake,{NAME}:fake"
    dist.init_process_group(backend, rank=0, world_size=count, store=fake_pg.FakeStore())
    try:
        mesh = lay_out(NAME, count, replicas, backend)
        with Fake(""):
            yield mesh
    finally:
        dist.destroy_process_group()
