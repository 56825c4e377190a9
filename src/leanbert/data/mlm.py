"""The data module of masked language modelling: settings, tokenizer, caches, loaders."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from leanbert.data.batches.batch import MLMBatch
from leanbert.data.batches.loading import PredictionInputs, RowDataset, encode_lines
from leanbert.data.batches.masking import MaskingRule, target_slots
from leanbert.data.batches.packing import row_count
from leanbert.data.formats.corpora import Separator
from leanbert.data.formats.examples import prediction_texts
from leanbert.data.module import RANGES, CorpusStatistics, RowData, as_list, check_accents, count_unknown, knows_more
from leanbert.data.store.prepare import CorpusSettings, Prepared
from leanbert.data.store.token_cache import TokenCache
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.data.tokenizers.training import Kind
from leanbert.errors import UserError
from leanbert.ranges import PART, SHARE, check_ranges


class MaskedLMData(RowData):
    """Text files to batches of packed, masked rows.

    After `setup` there are `tokenizer` (a `TextTokenizer`), `unigram_counts` (int64 [V], of the training
    text), `statistics` ("train" and "val" to `CorpusStatistics`) and `batches_per_epoch`. The training stream
    goes on from `samples_consumed`, a count of rows over all devices, which the task keeps.

    Args:
        train_files: Paths, globs such as `'corpus/**/*.txt'` or `hf:NAME_OR_FOLDER[:[CONFIGURATION:]SPLIT]`; .txt
            .jsonl .csv .tsv (each also .gz) and .parquet. Default: the docstrings of Python and the installed
            libraries.
        val_files: The same for validation. Default: a share of the documents is held out.
        predict_files: What is to be filled: lines of text files, records as of training, or `-` for the lines of
            standard input.
        text_field: JSON field or column that holds the text; `a.b` is the field b inside the field a.
        document_separator: What separates documents in text files: a blank line, or the line's end.
        val_share: Share of documents held out where there are no `val_files`, chosen by their hash.
        tokenizer: tokenizer.json, vocab.txt, a folder with one, or a .ckpt. Default: trained on the corpus.
        tokenizer_kind: Kind of tokenizer to train; auto: WordPiece, or byte-level BPE for text without spaces.
        lowercase: Whether a trained tokenizer lowercases.
        strip_accents: Whether a trained tokenizer strips accents. Default: WordPiece does where it lowercases.
        vocab_size: Entries of a trained tokenizer.
        max_length: Tokens in a row.
        batch_size: Rows in one optimizer step, over all devices.
        val_batch_size: Rows in one evaluation batch, over all devices. Default: `batch_size`.
        mask_rate: Share of tokens to predict.
        mask_split: Share of them replaced by the mask token, by a random token, and left.
        whole_word: Mask whole words.
        val_mask_rate: Share of tokens to predict in evaluation, where masks never change.
        num_workers: Processes that load batches. Default: 0 on a CPU, 2 with an accelerator.
        cache_dir: Folder of tokenizers and token caches. Default: leanbert in the user's cache folder.
        seed: Decides the order of rows and the masks of training (the CLI sets it to seed_everything if it is 0).
    """

    def __init__(
        self,
        train_files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        text_field: str = "text",
        document_separator: Separator = "blank_line",
        val_share: float = 0.02,
        tokenizer: str | None = None,
        tokenizer_kind: Kind = "auto",
        lowercase: bool = True,
        strip_accents: bool | None = None,
        vocab_size: int = 8192,
        max_length: int = 128,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        mask_rate: float = 0.2,
        mask_split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        whole_word: bool = False,
        val_mask_rate: float = 0.15,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        _check(self.hparams)
        self.unigram_counts: np.ndarray
        self._prepared: Prepared | None = None

    def prepare(self) -> Prepared:
        """Make, or find, tokenizer and token caches; needs no device and prints nothing to standard output."""
        if self._prepared is None:
            self._prepared = self._corpus_settings().prepare()
        return self._prepared

    def validation_texts(self) -> Iterator[str]:
        """Yield the validation documents as they were written."""
        return self._corpus_settings().validation_texts()

    def planned_vocabulary(self) -> int | None:
        """Return the size of the tokenizer that is given or prepared."""
        return super().planned_vocabulary() if self._prepared is None else self._prepared.tokenizer.vocab_size

    def pretend_prepared(self, vocab_size: int | None = None) -> None:
        """Have a tokenizer's size and counts without a corpus, for planning; `vocab_size` defaults to the setting's."""
        size = vocab_size or self.hparams["vocab_size"]
        self.tokenizer = SimpleNamespace(vocab_size=size)  # type: ignore[assignment]
        self.unigram_counts = np.ones(size, dtype=np.int64)

    def blank_batch(self, rows: int, *, validation: bool = False) -> MLMBatch:
        """Return zeros in the shapes of what the loaders yield, for planning."""
        length = self.hparams["max_length"]
        slots = target_slots(self.hparams["val_mask_rate" if validation else "mask_rate"], length)
        shapes = [(rows, length)] * 3 + [(rows, slots)] * 2
        return MLMBatch(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes))

    def adopt_prepared(self) -> None:
        """Set tokenizer, unigram counts and statistics."""
        prepared = self.prepare()
        self.tokenizer = prepared.tokenizer
        self.unigram_counts = prepared.train.unigram_counts
        self.statistics = {
            name: _statistics(cache, self.tokenizer, self.hparams["max_length"])
            for name, cache in (("train", prepared.train), ("val", prepared.val))
        }
        for name, statistics in self.statistics.items():
            if statistics.unknown_share == 1.0:
                raise UserError(f"data.{name}_files: every token is unknown. Set {knows_more(self.hparams)}")

    def training_rows(self) -> RowDataset:
        """Return rows whose masks change with each epoch."""
        return self._rows(self.prepare().train, self.hparams["mask_rate"], seed=self.hparams["seed"])

    def evaluation_rows(self, part: str) -> RowDataset:
        """Return rows with masks that depend on the place in the text only."""
        if part != "val":
            raise UserError(
                "test: use validate, on the text as data.val_files: masked language modelling has nothing else"
            )
        return self._rows(self.prepare().val, self.hparams["val_mask_rate"])

    def prediction_batches(self, files: list[str], batch_size: int) -> PredictionInputs:
        """Return texts with masks in them."""
        length = self.hparams["max_length"]
        return PredictionInputs(
            lambda: (texts[0] for texts in prediction_texts(files, [self.hparams["text_field"]])),
            lambda texts: encode_lines(texts, self.tokenizer, length),
            batch_size,
            length,
        )

    def _rows(self, cache: TokenCache, rate: float, seed: int | None = None) -> RowDataset:
        rule = self._masking_rule(rate)
        return RowDataset(cache, self.hparams["max_length"], self.tokenizer.pad_id, rule, seed)

    def _corpus_settings(self) -> CorpusSettings:
        names = CorpusSettings.__dataclass_fields__
        settings = {name: value for name, value in self.hparams.items() if name in names}
        for name in ("train_files", "val_files"):
            settings[name] = as_list(settings[name])
        return CorpusSettings(**settings)

    def _masking_rule(self, rate: float) -> MaskingRule:
        special = np.zeros(self.tokenizer.vocab_size, dtype=bool)
        special[self.tokenizer.special_ids] = True
        continues = self.tokenizer.continuation_table() if self.hparams["whole_word"] else None
        if continues is not None and not continues.any():
            raise UserError("data.whole_word: no token of this tokenizer continues a word. Set it to false")
        return MaskingRule(rate, tuple(self.hparams["mask_split"]), self.tokenizer.mask_id, special, continues)


def _check(settings: Any) -> None:
    """Raise `UserError` for a setting that cannot work, before anything is read."""
    check_ranges("data", settings, {**RANGES, "mask_rate": PART, "val_mask_rate": PART, "mask_split": SHARE})
    check_accents(settings)
    split = tuple(settings["mask_split"])
    if len(split) != 3 or abs(sum(split) - 1) > 1e-6:
        raise UserError(f"data.mask_split: {list(split)} are not three shares that add up to 1. Set [0.8, 0.1, 0.1]")


def _statistics(cache: TokenCache, tokenizer: TextTokenizer, length: int) -> CorpusStatistics:
    rows = row_count(cache.tokens, length)
    unknown, real = count_unknown(cache.unigram_counts, tokenizer)
    return CorpusStatistics(cache.documents, cache.tokens, unknown / max(1, real), rows, cache.tokens / rows)
