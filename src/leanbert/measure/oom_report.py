"""What was live when memory ran out, and what would help most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanbert.errors import first_line
from leanbert.measure.timeline import CATEGORIES, Storage, layer_of
from leanbert.measure.trace import known_tensors, live_tensors, storages
from leanbert.units import MIB

LARGEST = 10

Makers = Mapping[tuple[int, torch.dtype], Sequence[str]]
"""Modules that made activations of so many bytes and a dtype in a step that was traced."""

HINTS = {
    "activations": "a shorter --data.max_length",
    "parameters": "a smaller model, --config configs/size/mini.yaml",
    "other": "tensors that the step did not make: look at the largest below, and at callbacks that keep tensors",
}
"""What helps besides techniques."""


def find_live(
    model: nn.Module, optimizers: Iterable[Optimizer], device_type: str, makers: Makers | None = None
) -> list[Storage]:
    """Return the live storages on `device_type`, without a trace: from Python's objects and autograd's graphs.

    Parameters, gradients and optimizer state are told by identity. What autograd keeps, or has a history, is an
    activation; `makers` says which modules made such ones. All else is `other`.
    """
    found: dict[int, Storage] = {}

    def add(tensor: Tensor, category: str, name: str) -> None:
        for storage in storages(tensor, device_type):
            record = Storage(category, name, "", tuple(tensor.shape), tensor.dtype, storage.nbytes())
            found.setdefault(id(storage), record)

    for category, name, tensor in known_tensors(model, optimizers):
        add(tensor, category, name)
    rest = live_tensors()
    graph = list(saved_tensors(rest))
    for tensor in (*graph, *(tensor for tensor in rest if tensor.grad_fn is not None)):
        add(tensor, "activations", _makers_of(tensor, makers or {}))
    for tensor in rest:
        add(tensor, "other", "")
    return list(found.values())


def saved_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what autograd keeps for the backward of `tensors`; checkpointed parts keep nothing and run nothing."""
    seen: set[Any] = set()
    ahead = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        ahead += [function for function, _ in node.next_functions if function is not None]
        for name in dir(node):
            if name.startswith("_raw_saved"):
                yield from _unpacked(node, name)


def _unpacked(node: Any, name: str) -> Iterator[Tensor]:
    try:
        raw = getattr(node, name)
    except RuntimeError:  # this node's backward has run
        return
    for saved in raw if isinstance(raw, (list, tuple)) else (raw,):
        tensor = getattr(saved, "data", None)  # as packed: to unpack could compute a checkpointed block again
        if isinstance(tensor, Tensor):
            yield tensor


def _makers_of(tensor: Tensor, makers: Makers) -> str:
    modules = makers.get((tensor.untyped_storage().nbytes(), tensor.dtype), ())
    return " or ".join(modules[:2]) + (f" or {len(modules) - 2} others" if len(modules) > 2 else "")


def makers_by_size(saved: Iterable[Storage]) -> dict[tuple[int, torch.dtype], list[str]]:
    """Return the modules that made the activations of a traced step, by their bytes and dtype."""
    makers: dict[tuple[int, torch.dtype], list[str]] = {}
    for storage in saved:
        modules = makers.setdefault((storage.size_bytes, storage.dtype), [])
        if storage.module and storage.module not in modules:
            modules.append(storage.module)
    return makers


def oom_report(error: BaseException, live: Sequence[Storage], when: str, advice: Mapping[str, Sequence[str]]) -> str:
    """Return the report as lines of text.

    Args:
        error: The failed allocation.
        live: What was live.
        when: The step, and what the list comes from.
        advice: Techniques that help, by category.

    """
    sizes: Counter[str] = Counter()
    for storage in live:
        sizes[storage.category] += storage.size_bytes
    total = sum(sizes.values())
    lines = [f"Out of memory {when}: {first_line(error)}"]
    lines += ["", f"Live tensors {total / MIB:>12,.1f} MiB"]
    lines += [f"  {name:<11}{sizes[name] / MIB:>12,.1f}   {sizes[name] / max(total, 1):>6.1%}" for name in CATEGORIES]
    lines += ["", f"The {min(LARGEST, len(live))} largest"]
    for storage in sorted(live, key=lambda storage: -storage.size_bytes)[:LARGEST]:
        dtype = str(storage.dtype).removeprefix("torch.")
        name = storage.module or "maker unknown"
        lines.append(f"  {storage.size_bytes / MIB:>10,.1f}   {storage.category:<12}{dtype} {storage.shape}  {name}")
    layers: Counter[str] = Counter()
    for storage in live:
        if storage.category == "activations" and storage.phase == "forward":  # traced: its maker is certain
            layers[layer_of(storage.module)[0]] += storage.size_bytes
    if layers:
        lines += ["", "Activations by layer"]
        lines += [f"  {size / MIB:>10,.1f}   {layer}" for layer, size in layers.most_common(LARGEST)]
    lines += ["", "What would help most", *_advice(sizes, advice)]
    return "\n".join(lines)


def _advice(sizes: Counter[str], advice: Mapping[str, Sequence[str]]) -> list[str]:
    """Return advice for what the step holds most of, for others at least half as large, and for "other" if it is."""
    largest = max((size for name, size in sizes.items() if name != "other"), default=0)
    names = [name for name, size in sizes.most_common() if size and 2 * size >= largest]
    texts = {name: [*advice.get(name, ()), *([HINTS[name]] if name in HINTS else [])] for name in CATEGORIES}
    # without any, the model was being built
    return [f"  {name}: {'; or '.join(texts[name])}." for name in (names if largest else ["parameters"])]
