"""What a student needs of its teacher for each training row, on disk, so that the teacher runs once.

A file holds the tensors of one name: N rows of the same shape and dtype, one after the other, as bytes.
Letters: N rows, B rows of a batch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from leanbert.data.batches.batch import Batch
from leanbert.data.batches.loading import in_batches
from leanbert.data.store.cache import made_once
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.models.pointer import Copied
from leanbert.units import format_size

COPIED = "copied."
"""Prefix of the tensors of a `Copied`."""

Outputs = dict[str, Any]
"""Tensors [B, ...] by name, and "copied": a `Copied`, what else the teacher's `logits` takes, or None."""

Columns = Mapping[str, tuple[str, list[int]]]
"""Of tensors by name torch's name of the dtype, and the shape of a row."""


class TeacherOutputs:
    """The tensors of all training rows.

    Args:
        folder: Has the file `NAME.bin` of each.
        columns: Which these are.

    """

    def __init__(self, folder: Path, columns: Columns) -> None:
        self._folder, self._columns = folder, columns

    def read(self, batch: Batch) -> Outputs:
        """Return the tensors of a batch's rows, on its device.

        Files are read, not mapped, so that resident memory does not grow with what was read. Raises UserError if one
        is gone, or shorter than it was.
        """
        device = batch.inputs.input_ids.device
        found: Outputs = {}
        for name, (dtype, shape) in self._columns.items():
            values = torch.empty(
                (len(batch), *shape), dtype=getattr(torch, dtype), device="cpu", pin_memory=device.type == "cuda"
            )
            self._fill(values, name, batch.row_numbers)
            found[name] = values.to(device, non_blocking=True)
        copied = [found.pop(name) for name in self._columns if name.startswith(COPIED)]
        return {**found, "copied": Copied(*copied) if copied else None}

    def _fill(self, values: Tensor, name: str, rows: list[int]) -> None:
        """Read the rows with these numbers into `values` [B, ...]."""
        path = self._folder / f"{name}.bin"
        try:
            with path.open("rb") as file:
                for row, target in zip(rows, as_bytes(values), strict=True):
                    file.seek(row * len(target))
                    if file.readinto(target) != len(target):
                        raise OSError(None, "ends before this row")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}. Start again: the teacher's outputs are made anew") from error


def make_outputs(folder: Path, rows: int, together: int, run: Callable[[np.ndarray], Outputs]) -> TeacherOutputs:
    """Return the teacher's outputs for N rows, which `run` gives for the rows with some numbers, int64 [B].

    They are made once, `together` rows at a time, as all below `data.cache_dir` is: other processes wait, and one that
    was killed leaves nothing that is taken for whole.

    Raises UserError: the disk has not that much room, or cannot be written.
    """

    def make(building: Path) -> dict[str, object]:
        columns: Columns = {}
        with ExitStack() as stack, tqdm(total=rows, desc="Teacher", unit="row", disable=None, leave=False) as bar:
            for numbers in in_batches(range(rows), together):
                outputs = run(np.asarray(numbers))
                found = _flat(outputs)
                if not columns:
                    columns = columns_of(outputs)
                    _check_room(sum(tensor[0].nbytes for tensor in found.values()) * rows, rows, folder)
                    files = {name: stack.enter_context((building / f"{name}.bin").open("wb")) for name in columns}
                for name, tensor in found.items():
                    files[name].write(as_bytes(tensor.cpu().contiguous()).data)
                bar.update(len(numbers))
        return {"columns": columns}

    return TeacherOutputs(folder, made_once(folder, make)["columns"])


def columns_of(outputs: Outputs) -> Columns:
    """Return the dtypes of tensors, and the shapes of their rows."""
    return {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:]))
        for name, tensor in _flat(outputs).items()
    }


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Return what a contiguous tensor [B, ...] on the host holds as uint8 [B, bytes of a row], in its memory."""
    return tensor.flatten(1).view(torch.uint8).numpy()


def _flat(outputs: Outputs) -> dict[str, Tensor]:
    """Return the tensors alone, those of a `Copied` by their own names."""
    copied = outputs["copied"]
    parts = {} if copied is None else {f"{COPIED}{name}": part for name, part in copied._asdict().items()}
    return {**{name: value for name, value in outputs.items() if name != "copied"}, **parts}


def _check_room(needed_bytes: int, rows: int, folder: Path) -> None:
    """Say what the outputs take. Raises UserError if there is no room for them."""
    free = shutil.disk_usage(folder.parent).free
    if needed_bytes > free:
        raise UserError(
            f"model.distillation.cache: the teacher's outputs for {rows:,} rows take {format_size(needed_bytes)}, but "
            f"the disk of {folder.parent} has {format_size(free)} free. Free some space, choose another disk with "
            "--data.cache_dir, or leave it out"
        )
    say(f"{'teacher':<11} runs over {rows:,} rows; its outputs take {format_size(needed_bytes)} in {folder}")


def forget_weights(model: nn.Module, needed: Iterable[Tensor]) -> None:
    """Let go of a model's weights but those `needed`; of the others the shape stays, on torch's device meta."""
    replaced: dict[Tensor, nn.Parameter] = {}
    kept = set(needed)
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            if weight not in kept:
                shape = replaced.setdefault(weight, nn.Parameter(weight.to("meta"), requires_grad=False))
                setattr(module, name, shape)
