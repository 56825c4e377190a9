"""Running text as packed rows with masks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from leanbert.data.batches.batch import IGNORED, MLMBatch, PredictBatch
from leanbert.data.batches.loading import Make, Rows, encode_lines
from leanbert.data.batches.masking import MaskingRule, mask_rows, target_slots
from leanbert.data.batches.packing import read_rows, row_count
from leanbert.data.formats.corpora import Corpus, held_out_border
from leanbert.data.formats.documents import Separator
from leanbert.data.formats.examples import prediction_texts
from leanbert.data.module import RowData
from leanbert.data.settings import Part
from leanbert.data.statistics import knows_more
from leanbert.data.store.documents import encode_documents, progress_bar
from leanbert.data.store.examples import Example, ExampleCache, Notes
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.data.tokenizers.training import sample_evenly
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs
from leanbert.ranges import PART, SHARE, check_ranges

SAMPLE_BYTES = 256 << 20
"""A tokenizer is trained on about so much text, spread evenly over a larger corpus."""

COMPRESSION = 3
"""How much text a compressed byte stands for, about, when the fraction to sample is reckoned."""


class MaskedLMData(RowData):
    """Text files to batches of packed, masked rows.

    After `setup` there are also `unigram_counts`: int64 [V], of the training text.

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
        mask_rate: Share of tokens to predict.
        mask_split: Share of them replaced by the mask token, by a random token, and left.
        whole_word: Mask whole words.
        val_mask_rate: Share of tokens to predict in evaluation, where masks never change.
        settings: See `RowData`.

    """

    sample = "docstrings"
    unit: ClassVar = "documents"
    read_by: ClassVar = ("text_field", "document_separator")
    nothing: ClassVar = "the corpus is empty. Give files with text"

    def __init__(
        self,
        train_files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        predict_files: str | list[str] | None = None,
        text_field: str = "text",
        document_separator: Separator = "blank_line",
        val_share: float = 0.02,
        mask_rate: float = 0.2,
        mask_split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        whole_word: bool = False,
        val_mask_rate: float = 0.15,
        **settings: Any,
    ) -> None:
        super().__init__(
            train_files=train_files, val_files=val_files, predict_files=predict_files, text_field=text_field,
            document_separator=document_separator, val_share=val_share, mask_rate=mask_rate, mask_split=mask_split,
            whole_word=whole_word, val_mask_rate=val_mask_rate, **settings,
        )  # fmt: skip
        check_ranges("data", self.hparams, {"mask_rate": PART, "val_mask_rate": PART, "mask_split": SHARE})
        split = tuple(mask_split)
        if len(split) != 3 or abs(sum(split) - 1) > 1e-6:
            raise UserError(
                f"data.mask_split: {list(split)} are not three shares that add up to 1. Set [0.8, 0.1, 0.1]"
            )
        self.unigram_counts: np.ndarray
        self._border: float | None = None

    # ---- documents

    @property
    def parts(self) -> tuple[Part, ...]:
        """Both, always: evaluation starts from the counts of the training text too."""
        return "train", "val"

    def corpus(self, part: Part) -> Corpus:
        """Return the files of a part, or of both, and how they are cut into documents."""
        own = part == "val" and self.hparams["val_files"] is not None
        files, setting = tuple(self.files(part)), f"data.{'val' if own else 'train'}_files"
        if not own and self.hparams["train_files"] is None:
            return Corpus(files, setting=setting)
        return Corpus(files, self.hparams["text_field"], self.hparams["document_separator"], setting)

    def held_out(self, part: Part) -> tuple[float, float]:
        """Return (low, high): a part has the documents that hash to [low, high)."""
        if self.hparams["val_files"] is not None:
            return 0.0, 1.0
        if self._border is None:
            self._border = held_out_border(self.corpus("train"), self.hparams["val_share"])
        return (0.0, self._border) if part == "val" else (self._border, 1.0)

    def texts(self) -> Iterator[str]:
        """Yield the training documents, of a large corpus a sample."""
        corpus = self.corpus("train")
        packed = {".gz", ".parquet"}
        sizes = (path.stat().st_size * (COMPRESSION if path.suffix in packed else 1) for path in corpus.files)
        fraction = SAMPLE_BYTES / max(1, sum(sizes))
        with progress_bar(corpus, "Tokenizer") as bar:
            pieces = corpus.pieces(*self.held_out("train"), bar.update)
            yield from sample_evenly((piece.text for piece in pieces), fraction)

    def encode(self, part: Part, notes: Notes) -> Iterator[Example]:
        """Yield the documents as ids."""
        corpus = self.corpus(part)
        with progress_bar(corpus, "Training text" if part == "train" else "Validation text") as bar:
            yield from encode_documents(corpus.pieces(*self.held_out(part), bar.update), self.tokenizer)

    def setup(self, stage: str) -> None:
        """Load what was prepared, with the counts of ids; refuse text of which the tokenizer knows nothing."""
        super().setup(stage)
        if stage != "predict":
            self.unigram_counts = self.cache("train").counts("ids")
        for name, statistics in self.statistics.items():
            if statistics.unknown_fraction == 1.0:
                raise UserError(f"data.{name}_files: every token is unknown. Set {knows_more(self.hparams)}")

    # ---- rows

    def number_of_rows(self, part: Part) -> int:
        """Return the number of rows into which the documents of a part are cut."""
        return row_count(self.cache(part).size("ids"), self.hparams["max_length"])

    def batches_of(self, part: Part, training: bool) -> Make:
        """Return what masks rows: in training anew in each epoch, in evaluation by the place in the text only."""
        rule = self._masking_rule(self.hparams["mask_rate" if training else "val_mask_rate"])
        return partial(masked_batch, self.cache(part), self.hparams["max_length"], self.tokenizer.pad_id, rule)

    def evaluation_rows(self, part: Part) -> Rows:
        """Return the rows of the validation text, whose masks never change."""
        if part != "val":
            raise UserError(
                "test: use validate, on the text as data.val_files: masked language modelling has nothing else"
            )
        return super().evaluation_rows(part)

    def validation_texts(self) -> Iterator[str]:
        """Yield the validation documents as they were written, of a long one the first piece."""
        pieces = self.corpus("val").pieces(*self.held_out("val"))
        return (piece.text for piece in pieces if piece.begins)

    def planned_vocabulary(self) -> int | None:
        """Return the size of the tokenizer that is given or prepared."""
        if self.caches:
            return self.tokenizer.vocab_size
        given = self.hparams["tokenizer"]
        return None if given is None else TextTokenizer.from_file(given).vocab_size

    def pretend_prepared(self, vocab_size: int | None) -> None:
        """Have a tokenizer's size and counts without a corpus, for planning; `vocab_size` defaults to the setting's."""
        size = vocab_size or self.hparams["vocab_size"]
        self.tokenizer = SimpleNamespace(vocab_size=size)  # type: ignore[assignment]
        self.unigram_counts = np.ones(size, dtype=np.int64)

    def blank_batch(self, rows: int, *, validation: bool = False) -> MLMBatch:
        """Return a batch of padding in the shapes of what the loaders yield, without targets."""
        length = self.hparams["max_length"]
        slots = target_slots(self.hparams["val_mask_rate" if validation else "mask_rate"], length)
        shapes = [(rows, length)] * 3 + [(rows, slots)] * 2
        *inputs, index, targets = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
        return MLMBatch(PackedInputs(*inputs), index, targets.fill_(IGNORED))

    def inputs(self, files: list[str]) -> Iterator[str]:
        """Yield texts with masks in them."""
        return (texts[0] for texts in prediction_texts(files, [self.hparams["text_field"]]))

    def encode_inputs(self, inputs: list[str]) -> tuple[PredictBatch, int]:
        """Return texts as a batch, and how many were cut."""
        return encode_lines(inputs, self.tokenizer, self.hparams["max_length"])

    def _masking_rule(self, rate: float) -> MaskingRule:
        special = np.zeros(self.tokenizer.vocab_size, dtype=bool)
        special[self.tokenizer.special_ids] = True
        continues = self.tokenizer.continuation_table() if self.hparams["whole_word"] else None
        if continues is not None and not continues.any():
            raise UserError("data.whole_word: no token of this tokenizer continues a word. Set it to false")
        return MaskingRule(rate, tuple(self.hparams["mask_split"]), self.tokenizer.mask_id, special, continues)


def masked_batch(
    cache: ExampleCache, length: int, pad_id: int, rule: MaskingRule, rows: np.ndarray, key: np.ndarray
) -> MLMBatch:
    """Return the rows with these numbers, int64 [B], masked as `key`, uint64 [B], decides."""
    packed = read_rows(cache, rows, length, pad_id)
    masked = mask_rows(packed, key, rule)
    inputs = PackedInputs.from_arrays(masked.ids, packed.positions, packed.documents)
    return MLMBatch(inputs, torch.from_numpy(masked.index), torch.from_numpy(masked.targets))
