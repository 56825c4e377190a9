"""What all data modules share: rows by position, loaders, and the place that a resumed run goes on from."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from leanbert.data.batches.loading import PositionSampler
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.ranges import COUNT, PART, SEED, Range

LENGTH = Range(least=8, whole=True)
VOCABULARY = Range(least=1, most=2**31 - 1, whole=True)
RANGES = {
    "max_length": LENGTH,
    "batch_size": COUNT,
    "val_batch_size": COUNT,
    "val_share": PART,
    "vocab_size": VOCABULARY,
    "num_workers": Range(least=0, most=1024, whole=True),
    "seed": SEED,
}
"""Ranges of the settings that all data modules have."""


_COUNTED = 1 << 20  # ids at a time: numpy counts a copy of eight bytes each


@dataclass(frozen=True)
class CorpusStatistics:
    """Size of a prepared corpus; `tokens_per_row` is the mean of real tokens in a row of `max_length`.

    `unknown_share` is of the tokens that stand for text: those of the template are none.
    """

    documents: int
    tokens: int
    unknown_share: float
    rows: int
    tokens_per_row: float


class RowData(LightningDataModule):
    """Rows, numbered, to batches: the training stream goes on from `samples_consumed`, which the task keeps.

    After `setup` there are `tokenizer` and `statistics` ("train" and "val"). The settings that all have are in
    `hparams`: `tokenizer`, `predict_files`, `max_length`, `batch_size`, `val_batch_size`, `num_workers`, `seed`.
    """

    fixed: ClassVar[tuple[str, ...]] = ("max_length",)
    """Settings that decide how text is encoded for the model: those of its checkpoint hold wherever it is used."""

    unit: ClassVar[str] = "documents"
    """What a corpus is counted in."""

    def __init__(self) -> None:
        super().__init__()
        self.samples_consumed = 0
        self.tokenizer: TextTokenizer
        self.statistics: dict[str, CorpusStatistics] = {}

    # ---- what a data module supplies

    def prepare(self) -> Any:
        """Make, or find, tokenizer and caches; needs no device and prints nothing to standard output."""
        raise NotImplementedError

    def adopt_prepared(self) -> None:
        """Set `tokenizer` and `statistics` from what was prepared."""
        raise NotImplementedError

    def training_rows(self) -> Dataset[Any]:
        """Return the rows to train on: indexed by an array of positions in the stream, it gives a batch."""
        raise NotImplementedError

    def evaluation_rows(self, part: str) -> Any:
        """Return the rows of "val" or "test", of which there are `rows`: indexed by their numbers, a batch."""
        raise NotImplementedError

    def prediction_batches(self, files: list[str], batch_size: int) -> Iterable[Any]:
        """Return the batches of `predict_files`, in order."""
        raise NotImplementedError

    def planned_vocabulary(self) -> int | None:
        """Return the size of a given tokenizer; None: one will be trained, with `vocab_size` entries at most."""
        tokenizer = self.hparams["tokenizer"]
        return None if tokenizer is None else TextTokenizer.from_file(tokenizer).vocab_size

    @property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        """What checkpoint and run keep, by the names of their settings."""
        return {"tokenizer": self.tokenizer}

    def take_tokenizers(self, path: str, stored: dict[str, Any], *, resumes: bool) -> None:
        """Use the tokenizers of the checkpoint at `path`, whose "leanbert" part is `stored`, and never train any.

        Raises:
            UserError: The run `resumes`, and its settings ask for other ones.
        """
        self.hparams["tokenizer"] = path

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data besides tokenizers: primitives, such as the labels' names."""
        return {name: self.hparams[name] for name in self.fixed}

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Take over the `facts` of the model that is used, and say which settings they replace."""
        for name in self.fixed:
            own, there = self.hparams[name], facts.get(name, self.hparams[name])
            if own != there:
                say(f"data.{name}: {there}, as the model was trained, not {own}")
                self.hparams[name] = there

    def start_from(self, facts: Mapping[str, Any]) -> None:
        """Let the data suit a model of the same task, with these `facts`, that training starts from."""

    # ---- what Lightning asks for

    def prepare_data(self) -> None:
        """Prepare once per machine, before the other processes look."""
        if not self._predicting():
            self.prepare()

    def setup(self, stage: str) -> None:
        """Load what was prepared; prediction needs the tokenizer only, and never trains one."""
        if stage != "predict":
            self.adopt_prepared()
            return
        if self.hparams["tokenizer"] is not None:
            self.tokenizer = TextTokenizer.from_file(self.hparams["tokenizer"])
        if not hasattr(self, "tokenizer"):
            raise UserError("data.tokenizer: predict needs the model's tokenizer. Give --ckpt_path, or its path")

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows, at least 1."""
        return max(1, self.statistics["train"].rows // self.hparams["batch_size"])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training stream, each time from `samples_consumed` on, for one epoch's steps."""
        rank, world_size = self._rank()
        batch_size = self.hparams["batch_size"]
        if batch_size % world_size:
            raise UserError(
                f"data.batch_size: {batch_size} is the batch over all devices and not divisible by their number "
                f"({world_size}). Set a multiple of {world_size}"
            )
        sampler = PositionSampler(
            batch_size,
            self.batches_per_epoch,
            start=lambda: self.samples_consumed,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(self.training_rows(), sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return all validation rows in order."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return all test rows in order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the lines of `predict_files`, `batch_size` at a time, in order."""
        files = as_list(self.hparams["predict_files"])
        if not files:
            raise UserError("data.predict_files: nothing to predict. Give text files, or - for standard input")
        return DataLoader(self.prediction_batches(files, self.hparams["batch_size"]), batch_size=None)  # type: ignore

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        rank, world_size = self._rank()
        batch_size = self.hparams["val_batch_size"] or self.hparams["batch_size"]
        rows = self.evaluation_rows(part)
        sampler = PositionSampler(
            batch_size, -(-rows.rows // batch_size), end=rows.rows, rank=rank, world_size=world_size
        )
        return self._loader(rows, sampler)

    def _predicting(self) -> bool:
        return self.trainer is not None and self.trainer.predicting

    def _loader(self, rows: Dataset[Any], sampler: PositionSampler) -> DataLoader[Any]:
        device = "cpu" if self.trainer is None else str(self.trainer.strategy.root_device.type)
        workers = self.hparams["num_workers"]
        if workers is None:
            workers = 0 if device == "cpu" else 2
        return DataLoader(
            rows,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=device == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_interrupt,
            # Without a generator of its own each pass would draw from the global one, and shift dropout.
            generator=torch.Generator().manual_seed(self.hparams["seed"]),
        )

    def _rank(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def check_accents(settings: Any) -> None:
    """Raise `UserError` for a setting of trained tokenizers where none is trained."""
    if settings["strip_accents"] is not None and settings["tokenizer"] and settings.get("target_tokenizer") != "train":
        raise UserError(
            "data.strip_accents: it is of tokenizers that are trained, and one is given (data.tokenizer, or "
            "model.init_from). Leave it out"
        )


def count_ids(ids: np.ndarray, size: int) -> np.ndarray:
    """Return how often each id below `size` occurs in mapped `ids`: int64 [size]."""
    parts = (ids[start : start + _COUNTED] for start in range(0, len(ids), _COUNTED))
    return sum((np.bincount(part, minlength=size) for part in parts), start=np.zeros(size, dtype=np.int64))


def count_unknown(counts: np.ndarray, tokenizer: TextTokenizer) -> tuple[int, int]:
    """Return how many tokens are unknown, and how many stand for text, by `counts` of each id, int64 [V]."""
    text = int(counts.sum() - counts[tokenizer.special_ids].sum())
    unknown = 0 if tokenizer.unk_id is None else int(counts[tokenizer.unk_id])
    return unknown, text + unknown


def knows_more(settings: Any) -> str:
    """Return what to set for a tokenizer that knows text which the one at hand does not."""
    if settings["tokenizer"] is not None:
        return "another data.tokenizer, one that knows these characters"
    return "data.tokenizer_kind bpe (byte-level, it knows all text) or unigram, or a larger data.vocab_size"


def as_list(files: str | list[str] | None) -> list[str] | None:
    """Return one file as a list of files."""
    return [files] if isinstance(files, str) else files


def _ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the one that trains: it saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
