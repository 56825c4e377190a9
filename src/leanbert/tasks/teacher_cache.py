"""A teacher whose outputs are kept on disk: what they depend on, and when they are made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leanbert.compression.teacher_outputs import Outputs, make_outputs
from leanbert.data.batches.batch import Batch
from leanbert.data.batches.loading import Make
from leanbert.data.mlm import MaskedLMData
from leanbert.data.module import RowData
from leanbert.data.settings import rows_per_device
from leanbert.data.store.cache import cache_folder
from leanbert.data.store.checksums import DigestMemory, digest_of, files_digests
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs

if TYPE_CHECKING:
    from leanbert.tasks.base import Task

FORMAT = 1
"""Part of the key: raise it when what is kept, or the packing of rows, changes."""

DRAWN = (
    "model.distillation.cache: what rows hold is drawn anew in each epoch, as masks are, so the teacher never sees one "
    "twice. Leave it out"
)


def check_cache(data: RowData, *, shards: bool) -> None:
    """Raise UserError where a teacher's outputs cannot be kept."""
    if shards:
        raise UserError("model.distillation.cache: the teacher is in shards, not whole on each device. Leave it out")
    if isinstance(data, MaskedLMData):
        raise UserError(DRAWN)


def keep_outputs(task: Task[Any]) -> None:
    """Have the outputs of a task's teacher for all training rows on disk, and let its blocks leave memory.

    Raises UserError: rows are not the same in each epoch, or the disk has no room.
    """
    trainer, data, distillation = task.trainer, task._data, task.distillation
    assert distillation is not None
    rows, device = data.training_rows(), trainer.strategy.root_device
    first = _first_rows(rows.make, min(8, rows.rows))

    def run(numbers: np.ndarray) -> Outputs:
        batch = rows.make(numbers, np.zeros(len(numbers), dtype=np.uint64))
        batch = (batch.delimited() if device.type == "cuda" else batch).to(device)
        with trainer.precision_plugin.train_step_context():
            return distillation.outputs(task.model_inputs(batch))

    most, techniques = rows_per_device(data.hparams["batch_size"], trainer.world_size), task.techniques
    one = 1 if techniques.recovery else None  # which need not recover
    together = min(bound or most for bound in (most, techniques.micro_batch, techniques.slice_rows, one))
    folder = cache_folder(data.hparams["cache_dir"]) / "teachers" / digest_of(_key(task, first, device))
    distillation.keep(make_outputs(folder, rows.rows, together, run))


def _key(task: Task[Any], first: Batch, device: torch.device) -> list[object]:
    """Return what decides the outputs: the teacher, the rows it reads, what is kept of it, and how it computes.

    `first` are some of these rows: tasks and data of users may make of a cache what they like.
    """
    data, distillation = task._data, task.distillation
    assert distillation is not None
    config = distillation.config
    memory = DigestMemory(cache_folder(data.hparams["cache_dir"]))
    teacher = files_digests(Path(str(task.teacher_source)), memory.digest)
    memory.save()
    packing = data.packing("train")
    packed = hashlib.blake2b(packing.order.tobytes() + packing.starts.tobytes(), digest_size=16).hexdigest()
    rows = [type(data).__name__, data.cache("train").folder.name, data.room, packed, _digest(task.model_inputs(first))]
    kept = [distillation.needed, bool(config.logits)]
    return [FORMAT, teacher, rows, kept, config.dtype, str(task.trainer.precision), device.type]


def _first_rows(make: Make, rows: int) -> Batch:
    """Return the first rows. Raises UserError if they are not the same whatever the key."""
    numbers = np.arange(rows)
    batch, again = (make(numbers, np.full(rows, key, dtype=np.uint64)) for key in (0, 1))
    one, other = batch.tensors(), again.tensors()
    if not all(torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one):
        raise UserError(DRAWN)
    return batch


def _digest(given: tuple[Any, ...]) -> str:
    """Return a digest of what a model takes."""
    parts = [[*part.tensors().values()] if isinstance(part, PackedInputs) else [part] for part in given]
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (each for part in parts for each in part if isinstance(each, Tensor)):
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
