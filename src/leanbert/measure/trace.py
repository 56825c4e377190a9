"""Where the bytes of one training step go: every tensor storage, from the operation that made it until it is freed.

A dispatch mode sees each operation's results, forward and backward, on any device and under `FakeTensorMode`. The
method is that of `torch.distributed._tools.mem_tracker` (PyTorch), by storage, so that views count once. What a kernel
allocates and frees inside one operation is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer

from leanbert.measure import torch_compat
from leanbert.measure.flops import counter_of
from leanbert.measure.target import stands_on_host
from leanbert.measure.timeline import Event, Storage, Timeline

aten = torch.ops.aten
SHARDED = {"all_gather_copy_in": "parameters", "split_with_sizes_copy": "parameters", "chunk_cat": "gradients"}
"""Category of what operations of FSDP2 (`torch.distributed.fsdp`, namespace fsdp) read and write."""
_active: list[LiveBytes] = []  # the backward of an accelerator runs in threads of its own: no thread-local here


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count what is made inside as of phase `name`; costs nothing to speak of while no trace is active.

    Put `with phase("optimizer")` around updates of weights, inside a backward pass too.
    """
    if not _active:
        yield
        return
    trace = _active[-1]
    before = trace.explicit_phase
    trace.enter_phase(name)
    try:
        yield
    finally:
        trace.enter_phase(before)


class LiveBytes:
    """Context in which the bytes of live tensor storages are recorded.

    Categories: `parameters` (with buffers), `gradients`, `optimizer` (its state, and what an update makes on the way),
    `activations` (all else made in forward, backward or validation), `other` (what was there before, such as the
    batch, and autocast's low-precision copies of weights). A storage has one category all its life: that of a gradient
    is `gradients` from the operation that made it. What FSDP2 gathers is `parameters`, what it scatters `gradients`.

    Args:
        model: Its parameters, buffers and `.grad`s are known, its modules name what they make.
        optimizers: Their state is known.
        existing: Further tensors that are live already; those that the step reads are found without.
        device_type: Storages on other devices do not count.
        first_phase: Phase of what is neither in a backward pass nor in `phase(...)`: forward or validation.

    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer] = (),
        *,
        existing: Iterable[Tensor] = (),
        device_type: str = "cpu",
        first_phase: str = "forward",
    ) -> None:
        self.device_type = device_type
        self.explicit_phase = self._phase = first_phase
        self._model = model
        self._module_names = {id(module): name for name, module in model.named_modules()}
        self._modules: list[str] = []  # those whose forward is running, the innermost last
        self._operation, self._has_reduced = 0, False
        self.flops: Counter[str] = Counter()  # of matrix products and attention, by phase
        self._events: list[Event] = [Event(0, first_phase, None, 0)]
        self._deferred: tuple[Event, Storage] | None = None
        self._start: list[Event] = []
        self._live: dict[int, tuple[Storage, Any]] = {}  # by id of the untyped storage, with its weak reference
        self._exit = ExitStack()
        others = (("other", "", tensor) for tensor in existing)
        for category, name, tensor in (*known_tensors(model, optimizers), *others):
            self._found(tensor, category, name)

    def __enter__(self) -> LiveBytes:
        """Start to record."""
        self._exit.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._exit.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                self._watch_gradient(name, parameter)
        self._watch_resizes()
        self._exit.enter_context(torch_compat.shapes_unseen())
        self._exit.enter_context(_Mode(self))
        _active.append(self)
        self._exit.callback(_active.remove, self)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; what is freed later does not count."""
        self._exit.close()
        self._live.clear()

    def timeline(self) -> Timeline:
        """Return what was recorded so far."""
        self._settle()
        return Timeline(self._start, self._events)

    def live(self) -> list[Storage]:
        """Return the storages that are live now; empty after the context."""
        return [storage for storage, _ in self._live.values()]

    def enter_phase(self, name: str) -> None:
        """Count what follows as of phase `name`, but for backward passes when `name` is forward."""
        self.explicit_phase = name
        self._set_phase()

    def _set_phase(self) -> None:
        now = self.explicit_phase
        if now == "forward" and torch_compat.in_backward_pass():  # an accumulated or recomputed forward in it, too
            now = "backward"
        if now != self._phase:
            self._settle()
            self._phase = now
            self._events.append(Event(self._operation, now, None, 0))  # what was live on entry

    def _enter_module(self, module: nn.Module, _: object) -> None:
        outer = self._modules[-1] if self._modules else ""
        self._modules.append(self._module_names.get(id(module), outer))

    def _leave_module(self, *_: object) -> None:
        del self._modules[-1:]

    def _watch_gradient(self, name: str, parameter: nn.Parameter) -> None:
        def label(parameter: Tensor) -> None:
            for record in self._records(parameter.grad):
                record.category, record.module = "gradients", name

        handle = parameter.register_post_accumulate_grad_hook(label)
        torch_compat.runs_first(handle, parameter)  # an optimizer in the backward pass frees the gradient
        self._exit.callback(handle.remove)

    def _watch_resizes(self) -> None:
        """Hear of resized storages, which no dispatch mode sees (as in `MemTracker`, PyTorch)."""
        resize = torch.UntypedStorage.resize_

        def watched(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._resized(storage)

        torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
        self._exit.callback(setattr, torch.UntypedStorage, "resize_", resize)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one operation and record what it makes."""
        self._settle()
        self._set_phase()
        self._operation += 1
        inputs = torch_compat.tensors_in((args, kwargs))
        for tensor in () if self._has_reduced else inputs:  # just after, gloo reads a copy that it has made unseen
            self._found(tensor, "other", "")
        self._has_reduced = func.namespace == "c10d" and "reduce_scatter" in func._opname
        result = func(*args, **kwargs)
        if count := counter_of(func):
            self.flops[self._phase] += count(*args, **kwargs, out_val=result)
        category = "optimizer" if self._phase == "optimizer" else "activations"
        if func is aten._to_copy.default and any(r.category == "parameters" for r in self._records(inputs)):
            category = "other"  # autocast keeps a low-precision copy of each weight
        for tensor in torch_compat.tensors_in(result):
            for storage in storages(tensor, self.device_type):
                self._made(storage, tensor.shape, tensor.dtype, category)
        if func.namespace == "fsdp" and func._opname in SHARDED:
            for record in self._records((args, kwargs, result)):
                if record.category in ("activations", "other"):
                    record.category = SHARDED[func._opname]
        if self._phase == "backward" and func is aten.add.Tensor and not torch.is_grad_enabled():
            self._defer_sum(inputs[0])
        return result

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Record that a storage has another size now: FSDP2 frees and fills the same ones again and again."""
        here = storage.device.type in (self.device_type, "meta")  # a fake tensor's storage is on meta
        if id(storage) in self._live or (here and storage.nbytes()):
            self._settle()
            self._set_phase()
            self._made(storage, torch.Size([storage.nbytes()]), torch.uint8, "parameters")

    def _records(self, tree: object) -> Iterator[Storage]:
        """Yield what is known of the storages of all tensors in a tree."""
        for tensor in torch_compat.tensors_in(tree):
            for storage in storages(tensor, self.device_type):
                if id(storage) in self._live:
                    yield self._live[id(storage)][0]

    def _found(self, tensor: Tensor, category: str, name: str) -> None:
        """Take in a tensor that was live before the trace."""
        for storage in storages(tensor, self.device_type):
            if id(storage) not in self._live:
                record = Storage(category, name, "", tuple(tensor.shape), tensor.dtype, storage.nbytes())
                self._watch(storage, record)
                self._start.append(Event(0, "", record, record.size_bytes))

    def _made(self, storage: torch.UntypedStorage, shape: torch.Size, dtype: torch.dtype, category: str) -> None:
        size = storage.nbytes()
        if id(storage) in self._live:
            record, _ = self._live[id(storage)]
            if size != record.size_bytes:  # resized
                self._events.append(Event(self._operation, self._phase, record, size - record.size_bytes))
                record.size_bytes = size
            return
        name = self._modules[-1] if self._modules else ""
        record = Storage(category, name, self._phase, tuple(shape), dtype, size)
        self._watch(storage, record)
        self._events.append(Event(self._operation, self._phase, record, size))

    def _defer_sum(self, summand: Tensor) -> None:
        """Let a sum of gradients, just recorded, take the place of its first summand if that is freed at once.

        Autograd adds in place to what nobody else holds (`can_accumulate_inplace` in torch's input_buffer.cpp, where
        a view counts as held), but not under a dispatch mode: the bytes recorded are those of a step without a trace.
        """
        if not summand._is_view() and self._events[-1].delta_bytes > 0:
            for record in self._records(summand):
                self._deferred = (self._events.pop(), record)

    def _watch(self, storage: torch.UntypedStorage, record: Storage) -> None:
        key = id(storage)

        def freed(_: object) -> None:
            if self._live.pop(key, None) is None:
                return
            if self._deferred is None or self._deferred[1] is not record:
                self._settle()
            self._events.append(Event(self._operation, self._phase, record, -record.size_bytes))
            self._settle()  # a sum takes the place of what was freed

        self._live[key] = (record, weakref.ref(storage, freed))

    def _settle(self) -> None:
        if self._deferred is not None:
            self._events.append(self._deferred[0])
            self._deferred = None


class _Mode(torch_compat.TorchDispatchMode):
    def __init__(self, trace: LiveBytes) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # a fake tensor is asked where it is, more often than all else
            return args[0].device
        if torch_compat.wraps_tensors(types):
            return NotImplemented
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and isinstance(func, torch_compat.OpOverload):
            with self:  # composite operations arrive whole here; their parts allocate
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.trace.run(func, args, kwargs)


def known_tensors(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (category, name, tensor) of the model's parameters, buffers and gradients and of the optimizers' state."""
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name
        yield "parameters", name, parameter
        if parameter.grad is not None:
            yield "gradients", name, parameter.grad
    for name, buffer in model.named_buffers():
        yield "parameters", name, buffer
    for optimizer in optimizers:
        for owner, state in optimizer.state.items():
            for key, value in state.items() if isinstance(state, dict) else ():
                for tensor in torch_compat.tensors_in(value):
                    yield "optimizer", f"{key} of {names.get(owner, 'a parameter')}", tensor


def live_tensors() -> list[Tensor]:
    """Return every real tensor that Python holds; those that only autograd holds are not among them."""
    tensors = (value for value in gc.get_objects() if issubclass(type(value), Tensor))
    return [tensor for tensor in tensors if not isinstance(tensor, torch_compat.FakeTensor)]


def storages(tensor: Tensor, device_type: str) -> Iterator[torch.UntypedStorage]:
    """Yield the storages, with bytes on `device_type` and not on its host, of a tensor or of a wrapper's inner ones."""
    for inner in torch_compat.unwrapped(tensor):
        here = inner.device.type == device_type and inner.layout is torch.strided and not stands_on_host(inner)
        if here and (storage := inner.untyped_storage()).nbytes():
            yield storage
