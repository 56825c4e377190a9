"""What the data modules of all tasks with answers share: files of records to a tokenizer and example caches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from leanbert.data.batches.packing import Packing, pack_examples
from leanbert.data.formats.corpora import Corpus, besides
from leanbert.data.module import RANGES, CorpusStatistics, RowData, as_list, check_accents, count_ids, count_unknown
from leanbert.data.store.corpus_digest import corpus_digest
from leanbert.data.store.example_store import Example, ExampleCache, build_examples
from leanbert.data.store.prepare import cache_folder, trained_tokenizer
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.data.tokenizers.training import Kind
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.ranges import check_ranges

TooLong = Literal["truncate", "refuse"]
Part = Literal["train", "val", "test"]


class ExampleData(RowData):
    """Files of examples to batches of packed rows, each with as many whole examples as there is room for.

    Args:
        train_files: Files of examples (.jsonl, .csv, .tsv, each also with .gz, and .parquet), globs of them, or
            hf:NAME_OR_FOLDER[:[CONFIGURATION:]SPLIT]. Default: an embedded sample.
        val_files: Validation examples. Default: those of the embedded sample, or `val_share` of the training examples.
        test_files: Test examples, for `test`.
        predict_files: What to answer: files as of training, whose answers may be missing, or text, one input a line;
            - is standard input, which is text.
        val_share: Share of the training examples that is held out for validation where `val_files` is not given.
        tokenizer: tokenizer.json, vocab.txt, a folder with one, or a checkpoint. Default: that of model.init_from, or
            one is trained on the training examples.
        tokenizer_kind: Kind of tokenizer to train; auto: WordPiece, or byte-level BPE for text without spaces.
        lowercase: Whether a trained tokenizer lowercases.
        strip_accents: Whether a trained tokenizer strips accents. Default: WordPiece does where it lowercases.
        vocab_size: Entries of a trained tokenizer, at most.
        max_length: Tokens in a row.
        too_long: What to do with an example that is longer than a row: truncate it (they are counted and told), or
            refuse.
        batch_size: Rows of one optimizer step over all devices.
        val_batch_size: Rows of one evaluation batch over all devices. Default: batch_size.
        num_workers: Processes that make batches. Default: 0 on a CPU, else 2.
        cache_dir: Folder of tokenizers and caches. Default: ~/.cache/leanbert.
        seed: Seed of the order of rows (the CLI sets it to seed_everything if it is 0).

    """

    unit: ClassVar[str] = "examples"
    dtypes: ClassVar[Mapping[str, str]]
    """Columns of the cache and their types."""
    lengths: ClassVar[tuple[str, ...]] = ("ids",)
    """Columns whose lengths decide how examples share a row."""

    def __init__(
        self,
        train_files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        val_share: float = 0.05,
        tokenizer: str | None = None,
        tokenizer_kind: Kind = "auto",
        lowercase: bool = True,
        strip_accents: bool | None = None,
        vocab_size: int = 8192,
        max_length: int = 128,
        too_long: TooLong = "truncate",
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
        **own: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {name: value for name, value in locals().items() if name in _COMMON} | own, logger=False
        )
        check_ranges("data", self.hparams, RANGES)
        check_accents(self.hparams)
        self.caches: dict[str, ExampleCache] = {}
        self._packings: dict[Part, tuple[Any, Packing]] = {}

    # ---- what a kind of data supplies

    def embedded(self, cache_dir: Path) -> dict[Part, Path]:
        """Return the files of the embedded sample."""
        raise NotImplementedError

    def texts(self, files: list[str]) -> Iterator[str]:
        """Yield the texts that a tokenizer is trained on."""
        raise NotImplementedError

    def encode(self, files: list[str], part: Part, facts: dict[str, Any]) -> Iterator[Example]:
        """Yield the examples of a part, and put into `facts` what its cache keeps; `self.tokenizer` is there."""
        raise NotImplementedError

    def key(self, part: Part) -> list[Any]:
        """Return what decides the encoding of a part besides files, tokenizer and length."""
        raise NotImplementedError

    def tokenizer_of(self, column: str) -> TextTokenizer:
        """Return the tokenizer that made the ids of a column."""
        return self.tokenizer

    # ---- files, tokenizer, caches

    def prepare(self) -> Any:
        """Make, or find, the tokenizer and the caches of the examples."""
        if not self.caches:
            self.tokenizer = self._tokenizer()
            for part in self.parts:
                self.cache(part)
        return self.caches

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is prepared: all that training needs, or the part that is evaluated."""
        evaluated: dict[Any, tuple[Part, ...]] = {"validate": ("val",), "test": ("test",)}
        return evaluated.get(self.trainer and self.trainer.state.fn, ("train", "val"))

    def cache(self, part: Part) -> ExampleCache:
        """Return the examples of a part.

        Raises:
            UserError: Its files are not set, or cannot be read.
        """
        if part not in self.caches:
            self.caches[part] = self._build(part)
        return self.caches[part]

    def adopt_prepared(self) -> None:
        """Set tokenizer and statistics."""
        self.prepare()
        self.statistics = {part: self._statistics(part) for part in self.parts}

    def planned_vocabulary(self) -> int:
        """Return the size of the tokenizer, and prepare what a plan needs to know of the examples."""
        self.prepare()
        return self.tokenizer.vocab_size

    def pretend_prepared(self, vocab_size: int | None) -> None:
        """Do nothing: `planned_vocabulary` has prepared."""

    def files(self, part: Part) -> list[str]:
        """Return the files of a part; validation may be held out of the training files.

        Raises:
            UserError: They are not set.
        """
        given = self._given(part)
        if given is not None:
            return given
        if self.hparams["train_files"] is None:
            return [str(self.embedded(self.cache_folder)[part])]
        if part == "val":
            return self._given("train") or []
        raise UserError(f"data.{part}_files: not set. Give the files of {part} examples")

    def _given(self, part: Part, kind: str = "files") -> list[str] | None:
        """Return the setting `PART_KIND`, that of training without what is evaluation's."""
        name = f"{part}_{kind}"
        given = as_list(self.hparams[name])
        others = {f"data.{other}_{kind}": as_list(self.hparams[f"{other}_{kind}"]) for other in ("val", "test")}
        if part != "train" or given is None:
            return given
        return besides(given, f"data.{name}", {other: some for other, some in others.items() if some})

    @property
    def cache_folder(self) -> Path:
        """Where tokenizers and caches are kept."""
        return cache_folder(self.hparams["cache_dir"])

    def held_out(self, part: Part) -> tuple[float, float]:
        """Return the hashes of texts, from and below, that belong to a part of shared files."""
        if self.hparams["train_files"] is None or self.hparams["val_files"] is not None or part == "test":
            return 0.0, 1.0
        share = self.hparams["val_share"]
        return (0.0, share) if part == "val" else (share, 1.0)

    def packing(self, part: Part) -> Packing:
        """Return which examples share a row: neighbours in evaluation, in training a random choice."""
        seed = self.hparams["seed"] if part == "train" else None
        decided_by = (self.cache(part).folder, self.room, self.slots, seed)  # settings may change, and are compared
        if part not in self._packings or self._packings[part][0] != decided_by:
            self._packings[part] = decided_by, pack_examples(self.needed(part), self.room, self.slots, seed)
        return self._packings[part][1]

    def needed(self, part: Part) -> np.ndarray:
        """Return the tokens that examples need in each of the sequences of a row: int64 [N, C]."""
        return self.cache(part).all_lengths(self.lengths)

    @property
    def room(self) -> tuple[int, ...]:
        """Tokens in each of the sequences that a row has."""
        return (self.hparams["max_length"],) * len(self.lengths)

    @property
    def slots(self) -> int:
        """Examples in a row, at most."""
        return int(self.hparams["max_length"])

    def tell(self, part: Part, facts: Mapping[str, Any]) -> None:
        """Say what the `facts` of a part's cache have to say: how many examples were cut."""
        if facts.get("cut"):
            say(f"{facts['cut']:,} examples were longer than {self.limits} and were cut")

    @property
    def limits(self) -> str:
        """The settings of length, with their values."""
        return f"data.max_length ({self.hparams['max_length']} tokens)"

    def fit_length(
        self, place: str, needed: int, length: int | None = None, setting: str = "data.max_length"
    ) -> bool:  # fmt: skip
        """Return whether an example must be cut to `length`, by default `max_length`; `setting` says how long it is.

        Raises:
            UserError: It is too long, and such are refused.
        """
        length = length or self.hparams["max_length"]
        if needed > length and self.hparams["too_long"] == "refuse":
            raise UserError(
                f"{place}: {needed} tokens, but a row has {length}. Raise {setting}, or truncate (data.too_long)"
            )
        return needed > length

    def _tokenizer(self) -> TextTokenizer:
        given = self.hparams["tokenizer"]
        if given is not None:
            return TextTokenizer.from_file(given)
        files = self.files("train")
        return self.trained(lambda: self.texts(files), self.hparams["vocab_size"])

    def trained(self, texts: Callable[[], Iterator[str]], vocab_size: int, *which: str) -> TextTokenizer:
        """Return a tokenizer trained on texts of the training files; `which` tells those that are not all of them."""
        names = ("val_share", "val_files")
        facts = [
            type(self).__name__,
            self._digest(self.files("train"), "data.train_files"),
            *(str(self.hparams[name]) for name in names),
            self.key("train"),
            *which,
        ]
        settings = {**self.hparams, "vocab_size": vocab_size}
        return trained_tokenizer(self.cache_folder, facts, texts, settings)

    def _build(self, part: Part) -> ExampleCache:
        files = self.files(part)
        tokenizers = "".join(tokenizer.to_json() for tokenizer in self.tokenizers.values())
        tokenizer = hashlib.blake2b(tokenizers.encode(), digest_size=16).hexdigest()
        settings = [self.hparams["max_length"], self.hparams["too_long"], self.held_out(part)]
        setting = f"data.{part}_files"
        key = [type(self).__name__, self._digest(files, setting), tokenizer, settings, self.key(part)]
        cache = build_examples(
            key, self.dtypes, lambda facts: self.encode(files, part, facts), self.cache_folder, setting
        )
        self.tell(part, cache.facts)
        return cache

    def _digest(self, files: list[str], setting: str) -> str:
        return corpus_digest(Corpus(tuple(files), setting=setting, suffixes=("",)), self.cache_folder)

    def _statistics(self, part: Part) -> CorpusStatistics:
        cache, length = self.cache(part), self.hparams["max_length"]
        tokens = int(sum(cache.lengths(column).sum() for column in self.lengths))
        rows = self.packing(part).rows
        unknown = real = 0
        for column in self.lengths:
            tokenizer = self.tokenizer_of(column)
            counted = count_unknown(count_ids(cache.values(column), tokenizer.vocab_size), tokenizer)
            unknown, real = unknown + counted[0], real + counted[1]
        per_row = tokens / rows / len(self.lengths)
        return CorpusStatistics(cache.count, tokens, unknown / max(1, real), rows, min(per_row, length))


_COMMON = frozenset(ExampleData.__init__.__annotations__) - {"return", "own"}
