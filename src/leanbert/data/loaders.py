"""Loaders of a data module's rows: which positions of the stream a rank takes, and the processes that make batches."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

from leanbert.data.batches.batch import Batch
from leanbert.data.batches.loading import PositionSampler, PredictionInputs, Rows
from leanbert.data.formats.corpora import as_list
from leanbert.data.settings import rows_per_device
from leanbert.errors import UserError

if TYPE_CHECKING:
    from leanbert.data.module import Part, RowData


def training_loader(data: RowData) -> DataLoader[Batch]:
    """Return batches of the training stream, each time from `samples_consumed` on, for one epoch's steps."""
    rank, world_size = _rank(data)
    batch_size = data.hparams["batch_size"]
    rows_per_device(batch_size, world_size)
    if (rows := data.statistics["train"].rows) < world_size:
        raise UserError(
            f"data.train_files: has {rows} rows, which {world_size} devices cannot share. Give more text, or use fewer "
            "devices"
        )
    sampler = PositionSampler(
        batch_size, data.batches_per_epoch, start=lambda: data.samples_consumed, rank=rank, world_size=world_size
    )
    return _loader(data, data.training_rows(), sampler)


def evaluation_loader(data: RowData, part: Part) -> DataLoader[Batch]:
    """Return all rows of a part in order."""
    rank, world_size = _rank(data)
    rows, batch_size = data.evaluation_rows(part), data.hparams["val_batch_size"] or data.hparams["batch_size"]
    if world_size > 1:
        rows.blank = data.blank_batch(1, validation=True)  # of a rank without a row
    sampler = PositionSampler(batch_size, -(-rows.rows // batch_size), end=rows.rows, rank=rank, world_size=world_size)
    return _loader(data, rows, sampler)


def prediction_loader(data: RowData) -> DataLoader[Batch]:
    """Return what is in `predict_files`, `batch_size` at a time, in order."""
    files = as_list(data.hparams["predict_files"])
    if not files:
        raise UserError("data.predict_files: nothing to predict. Give text files, or - for standard input")
    length, batch_size = data.hparams["max_length"], data.hparams["batch_size"]
    inputs = PredictionInputs(lambda: data.inputs(files), data.encode_inputs, batch_size, length)
    return DataLoader(inputs, batch_size=None)


def _loader(data: RowData, rows: Rows, sampler: PositionSampler) -> DataLoader[Batch]:
    device = "cpu" if data.trainer is None else str(data.trainer.strategy.root_device.type)
    workers = data.hparams["num_workers"]
    if workers is None:
        workers = 0 if device == "cpu" else 2
    return DataLoader(
        rows,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=device == "cuda",
        collate_fn=Batch.delimited if device == "cuda" else None,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupt,
        # Without a generator of its own each pass would draw from the global one, and shift dropout.
        generator=torch.Generator().manual_seed(data.hparams["seed"]),
    )


def _rank(data: RowData) -> tuple[int, int]:
    return (0, 1) if data.trainer is None else (data.trainer.global_rank, data.trainer.world_size)


def _ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that trains: it saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
