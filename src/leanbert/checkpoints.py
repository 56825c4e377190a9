"""Checkpoint files: written atomically, read without executing anything, found again after a kill."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from leanbert.data.storage import DISK_FULL
from leanbert.errors import UserError
from leanbert.models.weights import DAMAGE, load_pickled

BEST = "best.ckpt"
AVERAGE = "average.ckpt"
TRAINING_STATE = ("callbacks", "optimizer_states", "lr_schedulers")
"""What weights do not need, and training cannot go on without."""


def step_name(step: int) -> str:
    """Return the file name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}.ckpt"


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Stream a checkpoint to a temporary file beside `path` and rename it: no copy in memory, no half-written file.

    Raises:
        UserError: The disk is full; the temporary file is gone and an older `path` is untouched.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            stream = _Stream(file)
            try:
                torch.save(checkpoint, stream)  # type: ignore[arg-type]
            except RuntimeError:  # torch's writer hides the reason; the stream has kept it
                raise stream.error or RuntimeError(f"torch could not write {path}") from stream.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"{path}: the disk is full, the checkpoint was not written; older ones are whole. "
                "Free space or set --trainer.default_root_dir to another disk."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


class _Stream:
    """A binary file that remembers why writing failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, memory-mapped, restricted to tensors and plain values.

    Raises:
        UserError: The file is missing, damaged, of another kind, or carries code (nothing of it is executed).

    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint. Check --ckpt_path (a file, or last, best or average).")
    checkpoint = load_pickled(path, "Use --ckpt_path last, which falls back to the one before.")
    if not isinstance(checkpoint, dict) or "leanbert" not in checkpoint or "state_dict" not in checkpoint:
        raise UserError(f"{path}: not a LeanBERT checkpoint. Weights of other programs go to --model.init_from.")
    return checkpoint


def mean(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the checkpoint at the last of `paths`, for evaluation only, with the mean of the weights of all of them.

    Files are read one after the other and their floating-point tensors averaged in float32 at least; the mean has their
    dtype. Other tensors are those of the last file. Tensors that share memory in the files share it in the mean.

    Raises:
        UserError: A file is damaged, or its weights have other names or shapes than those of the first.

    """
    means: dict[str, Tensor] = {}
    for count, path in enumerate(paths, 1):
        checkpoint = load(path)
        weights = checkpoint["state_dict"]
        once: dict[tuple[int, torch.Size], str] = {}
        same = {name: once.setdefault((tensor.data_ptr(), tensor.shape), name) for name, tensor in weights.items()}
        if count == 1:
            means = {name: _wide(weights[name], copy=True) for name in once.values()}
        elif {name: weights[name].shape for name in once.values()} != {name: m.shape for name, m in means.items()}:
            raise UserError(f"{path}: other weights than {paths[0]}, they have no mean. Leave one of the files out.")
        for name, total in means.items():
            if total.is_floating_point():
                total.lerp_(_wide(weights[name]), 1 / count)  # exact where all are equal, zeros stay zeros
            else:
                total.copy_(weights[name])
    for name in means:
        means[name] = means[name].to(weights[name].dtype)
    kept = {part: value for part, value in checkpoint.items() if part not in TRAINING_STATE}
    return {**kept, "state_dict": {name: means[first] for name, first in same.items()}}


def _wide(tensor: Tensor, copy: bool = False) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
    return tensor.to(dtype, copy=copy)


def is_whole(path: Path) -> bool:
    """Return whether every record of a checkpoint file passes its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except DAMAGE:
        return False


def newest_run(task_folder: Path) -> Path | None:
    """Return the `version_N` folder with the largest N that holds checkpoints; a failed start leaves none."""
    runs = {
        int(match[1]): folder
        for folder in task_folder.glob("version_*")
        if (match := re.fullmatch(r"version_(\d+)", folder.name)) and any(folder.glob("checkpoints/*.ckpt"))
    }
    return runs[max(runs)] if runs else None


def find(which: str, task_folder: Path) -> Path:
    """Return the checkpoint that `last`, `best` or `average` means: of the newest run below `task_folder`.

    `last` is the newest file that is whole: one damaged by a crash falls back to the one before.

    Raises:
        UserError: There is no run, or none of its checkpoints is usable.

    """
    run = newest_run(task_folder)
    if run is None:
        raise UserError(f"--ckpt_path {which}: no run below {task_folder}. Leave --ckpt_path out to start one.")
    if which == "last":
        return newest_whole(run)
    path = run / "checkpoints" / {"best": BEST, "average": AVERAGE}[which]
    if not path.is_file():
        reason = (
            "The run has not validated yet"
            if which == "best"
            else "It is written at the end of a run with checkpoint.average_last or average_best"
        )
        raise UserError(f"--ckpt_path {which}: no {path}. {reason}: use last, or give a file.")
    return path


def newest_whole(run: Path) -> Path:
    """Return the newest checkpoint of a run's folder that passes its checksums.

    Raises:
        UserError: There is none.
    """
    folder = run / "checkpoints"
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        if is_whole(path):
            return path
    raise UserError(f"--ckpt_path: no usable checkpoint in {folder}. Give a file, or leave it out to start anew.")


class StreamedCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files through `save` and `load` of this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write atomically; see `save`."""
        save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read with `weights_only`; see `load`."""
        return load(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file if it is there."""
        Path(path).unlink(missing_ok=True)
