"""Checkpoints: written atomically, read without executing anything, checked against their checksums.

Each is a file, or a folder of shards (see `leanbert.shard_files`), which is read as the file would be.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from leanbert import shard_files, signals
from leanbert.errors import UserError
from leanbert.files import DISK_FULL, REST, temporary
from leanbert.untrusted import check_sums, load_pickled

if sys.platform == "win32":  # an open file cannot be deleted there
    fcntl: Any = None
else:
    import fcntl

_held: list[BinaryIO] = []

BEST = "best.ckpt"
AVERAGE = "average.ckpt"
TRAINING_STATE = ("callbacks", "optimizer_states", "lr_schedulers")
"""What weights do not need, and training cannot go on without."""

FALL_BACK = "Use --ckpt_path last, which falls back to the one before."


def step_name(step: int) -> str:
    """Return the name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}.ckpt"


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Stream a checkpoint to a temporary file beside `path` and rename it: no copy in memory, no half-written file.

    Raises:
        UserError: The disk is full; the temporary file is gone and an older `path` is untouched.

    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary(path) as building:
            with open(building, "wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # of torch's writer, which ends a file that an OSError has cut short
                    raise error.__context__ or error from None
                file.flush()
                os.fsync(file.fileno())
            os.replace(building, path)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"{path}: the disk is full, the checkpoint was not written; older ones are whole. "
                "Free space or set --trainer.default_root_dir to another disk."
            ) from error
        raise


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, restricted to tensors and plain values; a file's tensors are memory-mapped.

    It is read once more, a piece at a time, for its checksums.

    Raises:
        UserError: It is missing, damaged, of another kind, or carries code (nothing of it is executed).

    """
    return fill(path, read(path))


def read(path: str | Path, *, all_sums: bool = True) -> dict[str, Any]:
    """Read a checkpoint as `load` does, but tensors that lie in shards are on the meta device: `fill` reads them.

    Args:
        path: The file or folder.
        all_sums: Whether shards are compared with their checksums too, which takes as long as reading them. Without
            that a shard that is missing or cut is noticed, not one that was changed.

    Raises:
        UserError: As `load`.

    """
    path = Path(path)
    checkpoint = _read(path)
    if not shard_files.holds_shards(path):
        check_sums(path, FALL_BACK)
    elif all_sums:
        shard_files.check_sums(path, FALL_BACK)
    return checkpoint


def fill(path: str | Path, checkpoint: dict[str, Any], place: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return what `read` returned, or a part of it, with all tensors: see `shard_files.fill`."""
    path = Path(path)
    return shard_files.fill(path, checkpoint, FALL_BACK, place) if shard_files.holds_shards(path) else checkpoint


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint without looking at its checksums, and without its shards."""
    if shard_files.holds_shards(path):
        checkpoint = shard_files.read_rest(path, FALL_BACK)
    elif path.is_file():
        checkpoint = load_pickled(path, FALL_BACK)
    else:
        raise UserError(f"{path}: no such checkpoint. Check --ckpt_path (a file, or last, best or average).")
    kinds = {"leanbert": dict, "state_dict": dict, "global_step": int}
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), kind) for k, kind in kinds.items()):
        raise UserError(f"{path}: not a LeanBERT checkpoint. Weights of other programs go to --model.init_from.")
    return checkpoint


def is_whole(path: Path) -> bool:
    """Return whether `load` reads a checkpoint."""
    try:
        read(path)
    except UserError:
        return False
    return True


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint is of, None if it is damaged; its weights are not read."""
    try:
        return int(_read(path)["global_step"])
    except UserError:
        return None


def mean(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the checkpoint at the last of `paths`, for evaluation only, with the mean of the weights of all of them.

    Files are read one after the other and their floating-point tensors averaged in float32 at least; the mean has their
    dtype. Other tensors are the last file's. Tensors that share memory in the files share it in the mean.

    Raises:
        UserError: A file is damaged, or its weights have other names or shapes than in the first.

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


def hold(path: Path) -> bool:
    """Keep `remove` from deleting a checkpoint as long as this process lives; return whether it is still there.

    A run that is trained deletes its older checkpoints while another process, such as `predict`, reads one.
    """
    handle = _handle(path)
    if handle.is_dir():
        return True  # reading it says that it is none
    try:
        file = handle.open("rb")
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_SH)
        there = handle.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
    except OSError:
        return True  # reading it says why
    _held.append(file)
    return there


def remove(path: Path) -> None:
    """Delete a checkpoint, or whatever is in its place, unless another process holds it."""
    handle = _handle(path)
    if fcntl is not None and handle.is_file():
        with handle.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            with temporary(path) as going:  # under another name a folder is no checkpoint, however much of it is left
                path.rename(going)
    else:
        signals.remove(path)


def put_aside(path: Path) -> None:
    """Give a checkpoint a name by which nothing looks for it."""
    aside = path.with_name(f"abandoned-{path.name}")
    signals.remove(aside)
    path.rename(aside)


def _handle(path: Path) -> Path:
    """Return the file that is locked for a checkpoint."""
    return path / REST if shard_files.holds_shards(path) else path


class StreamedCheckpointIO(CheckpointIO):
    """Lightning's checkpoints through `save`, `read` and `fill` of this module.

    Args:
        path: A checkpoint that is read already.
        checkpoint: What `read` returned: given once, and then forgotten.

    """

    def __init__(self, path: str | None = None, checkpoint: dict[str, Any] | None = None) -> None:
        self._path, self._checkpoint = path, checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: object = None) -> None:
        """Write atomically; see `save`."""
        save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read with `weights_only`; see `load`. `map_location` is the `place` of `fill`."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None or str(path) != self._path:
            checkpoint = read(path)
        place = map_location if callable(map_location) else None
        filled: dict[str, Any] = fill(path, checkpoint, place)
        return filled

    def remove_checkpoint(self, path: Any) -> None:
        """Delete it if it is there."""
        signals.remove(path)
