"""What all data modules share: files to a tokenizer and cached examples, and these to batches by position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from leanbert.data.batches.batch import Batch
from leanbert.data.batches.loading import Make, Rows
from leanbert.data.batches.packing import Packing, pack_examples
from leanbert.data.caching import examples_of, trained_tokenizer
from leanbert.data.formats.corpora import Corpus
from leanbert.data.loaders import evaluation_loader, prediction_loader, training_loader
from leanbert.data.samples.embedded import Sample
from leanbert.data.settings import PARTS, Part, check_settings, files_of, take_over
from leanbert.data.statistics import CorpusStatistics, count
from leanbert.data.store.examples import Example, ExampleCache, Notes
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.data.tokenizers.training import Kind
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.models.stored import ModelMetadata


class RowData(LightningDataModule):
    """Files of examples to batches of packed rows, each with as many whole examples as there is room for.

    The training stream goes on from `samples_consumed`, a count of rows over all devices, which the task keeps. After
    `setup` there are `tokenizer` and `statistics` ("train" and "val").

    Args:
        train_files: Files of examples (.jsonl, .csv, .tsv, each also with .gz, and .parquet), globs of them, or
            hf:NAME_OR_FOLDER[:[CONFIGURATION:]SPLIT]. Default: an embedded sample.
        val_files: Validation examples. Default: the embedded sample's, or `val_share` of the training examples.
        predict_files: What to answer: files as of training, or lines of text; - is standard input, which has lines.
        val_share: Share of the training examples that is held out for validation where `val_files` is not given.
        tokenizer: tokenizer.json, vocab.txt, a folder with one, or a checkpoint. Default: init_from's, or trained.
        tokenizer_kind: Kind of tokenizer to train; auto: WordPiece, or byte-level BPE for text without spaces.
        lowercase: Whether a trained tokenizer lowercases.
        strip_accents: Whether a trained tokenizer strips accents. Default: WordPiece does where it lowercases.
        vocab_size: Entries of a trained tokenizer, at most.
        max_length: Tokens in a row.
        batch_size: Rows of one optimizer step over all devices.
        val_batch_size: Rows of one evaluation batch over all devices. Default: batch_size.
        num_workers: Processes that make batches. Default: 0 on a CPU, else 2.
        cache_dir: Folder of tokenizers and caches. Default: ~/.cache/leanbert.
        seed: Decides the order of rows, and masks in training (the CLI sets it to seed_everything if it is 0).

    """

    sample: Sample
    """Name of the embedded sample."""
    fixed: ClassVar[tuple[str, ...]] = ("max_length",)
    """Settings that decide how text is encoded: a checkpoint's values replace those of the run that uses it."""
    unit: ClassVar[str] = "examples"
    """What the data are counted in."""
    nothing: ClassVar[str] = "there is no example in it. Give files with examples"
    """What the error says of files without any."""
    other_columns: Mapping[str, str] = MappingProxyType({})
    """Columns of the cache besides the ids, and their types."""
    read_by: ClassVar[tuple[str, ...]] = ()
    """Settings by which files are read."""
    shaped_by: ClassVar[tuple[str, ...]] = ()
    """Settings that shape a cached example besides."""

    def __init__(
        self,
        train_files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        val_share: float = 0.05,
        tokenizer: str | None = None,
        tokenizer_kind: Kind = "auto",
        lowercase: bool = True,
        strip_accents: bool | None = None,
        vocab_size: int = 8192,
        max_length: int = 128,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        **own: Any,
    ) -> None:
        common = {name: value for name, value in locals().items() if name not in ("self", "own", "__class__")}
        super().__init__()
        self.save_hyperparameters(common | own, logger=False)
        check_settings(self.hparams)
        self.samples_consumed = 0
        self.tokenizer: TextTokenizer
        self.statistics: dict[str, CorpusStatistics] = {}
        self.caches: dict[str, ExampleCache] = {}
        self._packings: dict[Any, Packing] = {}

    # ---- what a kind of data supplies

    def key(self, part: Part) -> list[object]:
        """Return what decides how the files of a part are read: values that JSON has."""
        return [self.hparams[name] for name in self.read_by]

    def texts(self) -> Iterator[str]:
        """Yield the texts that a tokenizer is trained on."""
        raise NotImplementedError

    def encode(self, part: Part, notes: Notes) -> Iterator[Example]:
        """Yield the examples of a part, and write what is known of them; the tokenizers are there."""
        raise NotImplementedError

    def batches_of(self, part: Part, training: bool) -> Make:
        """Return what makes batches of the rows of a part: it pickles, for other processes."""
        raise NotImplementedError

    def blank_batch(self, rows: int, *, validation: bool = False) -> Batch:
        """Return a batch of padding in the shapes of a real one, without targets."""
        raise NotImplementedError

    def inputs(self, files: list[str]) -> Iterator[Any]:
        """Yield what is to be answered out of files."""
        raise NotImplementedError

    def encode_inputs(self, inputs: list[Any]) -> tuple[Batch, int]:
        """Return inputs as a batch, and how many of them were cut."""
        raise NotImplementedError

    # ---- tokenizers

    @property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        """What checkpoint and run keep, by the names of their settings."""
        return {"tokenizer": self.tokenizer}

    @property
    def columns(self) -> dict[str, TextTokenizer]:
        """The columns of ids, which stand side by side in a row, and the tokenizer of each."""
        return {"ids": self.tokenizer}

    def take_tokenizers(self, path: str, stored: dict[str, Any], *, resumes: bool) -> None:
        """Use the tokenizers of the checkpoint at `path`, whose "leanbert" part is `stored`, and never train any.

        Raises UserError if the run `resumes` and its settings ask for other ones.
        """
        self.hparams["tokenizer"] = path

    def make_tokenizers(self) -> None:
        """Read, or train, the tokenizers."""
        given = self.hparams["tokenizer"]
        self.tokenizer = trained_tokenizer(self, self.texts) if given is None else TextTokenizer.from_file(given)

    # ---- files and caches

    def files(self, part: Part) -> list[str]:
        """Return the files of a part; validation may be held out of the training files."""
        return files_of(self.hparams, part, self.sample)

    def corpus(self, part: Part) -> Corpus:
        """Return the files of a part, and how they are read."""
        return Corpus(tuple(self.files(part)), setting=f"data.{part}_files", suffixes=("",))

    def held_out(self, part: Part) -> tuple[float, float]:
        """Return (low, high): of files that parts share, a part has the texts that hash to [low, high)."""
        if self.hparams["train_files"] is None or self.hparams["val_files"] is not None or part == "test":
            return 0.0, 1.0
        border = self.hparams["val_share"]
        return (0.0, border) if part == "val" else (border, 1.0)

    def prepare(self) -> None:
        """Make, or find, tokenizers and caches; needs no device and prints nothing to standard output."""
        if not self.caches:
            self.make_tokenizers()
            for part in self.parts:
                self.cache(part)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is prepared: all that training needs, or the part that is evaluated."""
        evaluated: dict[Any, tuple[Part, ...]] = {"validate": ("val",), "test": ("test",)}
        return evaluated.get(self.trainer and self.trainer.state.fn, ("train", "val"))

    def cache(self, part: Part) -> ExampleCache:
        """Return the examples of a part. Raises UserError if its files are not set, or cannot be read."""
        if part not in self.caches:
            self.caches[part] = examples_of(self, part)
            self.check(part, self.caches[part])
        return self.caches[part]

    def check(self, part: Part, cache: ExampleCache) -> None:
        """Say what is to be known of a part: how many examples were cut."""
        if cache.notes.cut:
            say(f"{cache.notes.cut:,} {PARTS[part]} examples were longer than {self.limits} and were cut")

    @property
    def limits(self) -> str:
        """The settings of length, with their values."""
        return f"data.max_length ({self.hparams['max_length']} tokens)"

    # ---- rows

    @property
    def room(self) -> tuple[int, ...]:
        """Tokens in each of the sequences that a row has."""
        return (self.hparams["max_length"],) * len(self.columns)

    @property
    def slots(self) -> int:
        """Examples in a row, at most."""
        return int(self.hparams["max_length"])

    def needed(self, part: Part) -> np.ndarray:
        """Return the tokens that examples need in each of the sequences of a row: int64 [N, C]."""
        return self.cache(part).lengths([*self.columns])

    def packing(self, part: Part) -> Packing:
        """Return which examples share a row: neighbours in evaluation, in training a random choice."""
        seed = self.hparams["seed"] if part == "train" else None
        key = (self.cache(part).folder, self.room, self.slots, seed)  # settings may change
        if key not in self._packings:
            self._packings[key] = pack_examples(self.needed(part), self.room, self.slots, seed)
        return self._packings[key]

    def number_of_rows(self, part: Part) -> int:
        """Return how many rows a part has."""
        return self.packing(part).rows

    def training_rows(self) -> Rows:
        """Return the rows to train on, in an order that changes with each epoch."""
        return Rows(self.number_of_rows("train"), self.batches_of("train", training=True), self.hparams["seed"])

    def evaluation_rows(self, part: Part) -> Rows:
        """Return the rows of a part in the order of the files."""
        return Rows(self.number_of_rows(part), self.batches_of(part, training=False))

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows, at least 1."""
        return max(1, self.statistics["train"].rows // self.hparams["batch_size"])

    # ---- what planning and checkpoints ask for

    def planned_vocabulary(self) -> int | None:
        """Return the size of the tokenizer, having prepared what a plan needs; None: one will be trained."""
        self.prepare()
        return self.tokenizer.vocab_size

    def pretend_prepared(self, vocab_size: int | None) -> None:
        """Have what `blank_batch` needs without a corpus, for planning; here `planned_vocabulary` has prepared it."""

    def metadata(self, task: str) -> ModelMetadata:
        """Return what a model of `task` that is trained on the data keeps of them besides tokenizers."""
        return ModelMetadata(task, **{name: self.hparams[name] for name in self.fixed})

    def adopt(self, metadata: ModelMetadata) -> None:
        """Take over the settings with which the model that is used was trained, and say which they replace."""
        for name in self.fixed:
            if (trained := getattr(metadata, name)) is not None:
                take_over(self.hparams, name, trained)

    def start_from(self, metadata: ModelMetadata) -> None:
        """Let the data suit a model of the same task that training starts from."""

    # ---- what Lightning asks for

    def prepare_data(self) -> None:
        """Prepare once per machine, before the other processes look."""
        if self.trainer is None or not self.trainer.predicting:
            self.prepare()

    def setup(self, stage: str) -> None:
        """Load what was prepared; prediction needs the tokenizer only, and never trains one."""
        if stage != "predict":
            self.prepare()
            self.statistics = {part: count(self, part) for part in self.parts}
            return
        if self.hparams["tokenizer"] is not None:
            self.tokenizer = TextTokenizer.from_file(self.hparams["tokenizer"])
        if not hasattr(self, "tokenizer"):
            raise UserError("data.tokenizer: predict needs the model's tokenizer. Give --ckpt_path, or its path")

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return batches of the training stream, each time from `samples_consumed` on, for one epoch's steps."""
        return training_loader(self)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return all validation rows in order."""
        return evaluation_loader(self, "val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return all test rows in order."""
        return evaluation_loader(self, "test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return what is in `predict_files`, `batch_size` at a time, in order."""
        return prediction_loader(self)
