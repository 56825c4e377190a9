"""Tensors without values, for dry runs: what an operation makes of arguments of some shapes is found out once.

A step does the same again in each block, micro-batch and candidate. torch remembers too, by a key that takes several
times as long as to make the tensor (`torch/_subclasses/fake_tensor.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanbert.measure.target import stands_on_host
from leanbert.measure.torch_compat import FakeTensor, FakeTensorMode, OpOverload, dispatch_keys, tensors_in

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that are what they are equal to."""


class _UnknownError(Exception):
    """There is more to an argument or a result than its description."""


class _Made(NamedTuple):
    """A tensor that an operation makes: on the storage of the argument `source`, or on one of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    source: int | None


class Fake(FakeTensorMode):
    """Tensors without values, of which a value that is read back is 1; loops over slices of them are shortened.

    Args:
        target: Kind of device that they stand for: cpu, cuda or mps.

    Attributes:
        flops: Counts the operations by phase of what runs now.

    """

    known: ClassVar[dict[Hashable, Any]] = {}
    """What operations make, by operation and arguments; for all dry runs of a process."""

    def __init__(self, target: str = "cpu") -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.target = target
        self.host: WeakSet[torch.UntypedStorage] | None = None  # what is in host memory, if that is apart
        self.moves_to_host = False
        self.flops: Counter[str] = Counter()

    def shorten(self, slices: list[slice], alike: bool) -> Iterator[slice]:
        """Yield the first slice if it is not `alike`, the next, which stands for all of its length, a shorter last."""
        lead = 0 if alike else 1
        same = [part for part in slices[lead:] if part.stop - part.start == slices[0].stop - slices[0].start]
        yield from slices[:lead]
        if same:
            before = self.flops.copy()
            yield same[0]
            for name, count in self.flops.items():
                self.flops[name] += (len(same) - 1) * (count - before[name])
        yield from slices[lead + len(same) :]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, types, args, kwargs or {})
        if self.host is not None and isinstance(func, OpOverload) and not func._schema.is_mutable:
            reads = any(map(stands_on_host, tensors_in((args, kwargs))))
            made = tensors_in(result) if reads or self.moves_to_host else []
            self.host.update(tensor.untyped_storage() for tensor in made)
        return result

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else True if dtype is torch.bool else 1
        if _changes_values_only(func) and isinstance(args[0], FakeTensor):
            return args[0]
        key = self._key(func, args, kwargs)
        if key in self.known:
            return self._make(self.known[key], args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if key is not None:
            self._remember(key, result, args, kwargs)
        return result

    def _key(self, func: Any, args: Any, kwargs: Any) -> Hashable:
        """Return what decides over the result of an operation; None where that is more than shapes and numbers."""
        if not _keeps_arguments(func):
            return None
        try:
            return func, torch.get_default_dtype(), self._describe(args), self._describe(tuple(kwargs.items()))
        except _UnknownError:
            return None

    def _describe(self, value: Any) -> Hashable:
        """Return all that operations go by of an argument, or can be told of a result; numbers with their types."""
        if isinstance(value, FakeTensor) and value.constant is None and value.fake_mode is self:
            return (
                value.dtype, value.shape, value.stride(), value.storage_offset(), value.untyped_storage().nbytes(),
                value.requires_grad, dispatch_keys(value),
            )  # fmt: skip
        if isinstance(value, list | tuple):
            return type(value), *map(self._describe, value)
        if isinstance(value, PLAIN):
            return type(value), value
        raise _UnknownError

    def _remember(self, key: Hashable, result: Any, args: Any, kwargs: Any) -> None:
        """Note how to make the result of an operation, if another one can be made so."""
        sources = {id(tensor.untyped_storage()): -1 for tensor in tensors_in((args, kwargs))}
        sources |= {id(arg.untyped_storage()): place for place, arg in enumerate(args) if isinstance(arg, FakeTensor)}
        try:
            described, made = self._describe(result), _made(result, sources)
            if self._describe(self._make(made, args)) == described:
                self.known[key] = made
        except _UnknownError:
            pass

    def _make(self, made: Any, args: Any) -> Any:
        if not isinstance(made, _Made):
            return type(made)([self._make(one, args) for one in made])
        meta = torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
        if made.source is not None:
            meta.set_(args[made.source].untyped_storage(), made.offset, made.shape, made.stride)
        return FakeTensor(self, meta, made.device)


@contextmanager
def host_apart(mode: Fake) -> Iterator[None]:
    """Context in which host memory is not that of a pretended device, though both are on the CPU.

    What FSDP2 copies to the host is there (`CPUOffloadPolicy`), and so is what is made of tensors that are; what it
    copies to the device is not. `mode` knows what is there.
    """
    mode.host = WeakSet()
    methods = {name: getattr(Tensor, name) for name in ("to", "cpu")}  # do nothing on a CPU: no mode sees them

    def watched(name: str, before: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def copied(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(tensor, DTensor) or (name == "to" and "non_blocking" not in kwargs):
                return before(tensor, *args, **kwargs)
            mode.moves_to_host = not kwargs.get("non_blocking", False)  # FSDP2 waits for it, but not for the device
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            finally:
                mode.moves_to_host = False

        return copied

    try:
        for name, method in methods.items():
            setattr(Tensor, name, watched(name, method))
        yield
    finally:
        for name, method in methods.items():
            setattr(Tensor, name, method)


def _made(result: Any, sources: dict[int, int]) -> Any:
    """Return what a result is; `sources` has the places of arguments by the identity of their storages."""
    if type(result) in (list, tuple):
        return type(result)([_made(one, sources) for one in result])
    if not isinstance(result, FakeTensor):
        raise _UnknownError
    storage = result.untyped_storage()
    source = sources.get(id(storage))
    if source == -1:  # inside a list, or of another result
        raise _UnknownError
    sources.setdefault(id(storage), -1)
    return _Made(result.shape, result.stride(), int(result.storage_offset()), result.dtype, result.device, source)


@cache
def _changes_values_only(func: OpOverload) -> bool:
    """Return whether an operation gives back its first argument with its shape: most of those of an update do."""
    name, results = func._schema.name, func._schema.returns
    in_place = name.startswith("aten::") and name.endswith("_") and not name.endswith("__")
    return in_place and len(results) == 1 and torch.Tag.inplace_view not in func.tags


@cache
def _keeps_arguments(func: Any) -> bool:
    """Return whether an operation is one of torch's own that changes none of its arguments."""
    return isinstance(func, OpOverload) and func.namespace == "aten" and not func._schema.is_mutable
