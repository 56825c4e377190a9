"""Pairs of a source and a target: sentences and their translations, documents and their summaries."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from leanbert.data.batches.batch import PairBatch, PredictBatch
from leanbert.data.batches.loading import ENCODED_TOGETHER, Make, encode_lines, in_batches
from leanbert.data.batches.pairs import PairCollator, output_frame
from leanbert.data.caching import trained_tokenizer
from leanbert.data.formats.corpora import Corpus, as_list
from leanbert.data.formats.documents import document_hash
from leanbert.data.formats.examples import parallel_lines, prediction_texts, read_records
from leanbert.data.formats.fields import has_field, text_of, texts_of, value_of
from leanbert.data.module import RowData
from leanbert.data.settings import LENGTH, VOCABULARY, Part, TooLong, given_files, must_be_cut, take_over
from leanbert.data.store.cache import cache_folder
from leanbert.data.store.checksums import corpus_digest
from leanbert.data.store.examples import Example, Notes
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.stored import ModelMetadata

TRAIN = "train"
"""Value of `data.target_tokenizer`: train one."""
TARGET = "target_tokenizer"
EMBEDDED_FIELDS = {"translation": ("source", "target"), "summarization": ("document", "summary")}
"""Fields of source and target in the embedded samples."""


class Pair(NamedTuple):
    """A source and its target, and where they stand; of evaluation all references, the target first."""

    where: str
    source: str
    target: str
    references: list[str]


class PairData(RowData):
    """Sources and targets, as two text files with a line each, or as fields of .jsonl, .csv and .tsv files.

    Args:
        sample: The embedded sample that is used without files: a synthetic language to translate into, or docstrings
            and their first lines.
        test_files: Test examples, for `test`.
        train_target_files: Text files of the targets, line by line to `train_files`; unset: `train_files` have both.
        val_target_files: The same of validation.
        test_target_files: The same of the test.
        source_field: Field of the source.
        target_field: Field of the target.
        references_field: Field with a list of further right outputs, for evaluation; a line may do without.
        too_long: What to do with an example that is longer than a row: truncate it (they are counted and told), or
            refuse.
        max_target_length: Target tokens in a row. Default: max_length.
        target_tokenizer: Tokenizer of the targets alone, as of `tokenizer`; train: model.init_from's if it has one,
            else one is trained on the training targets, and the sources' on sources. Default: one for both.
        target_vocab_size: Entries of a trained tokenizer of the targets, at most. Default: vocab_size.
        settings: See `RowData`.

    """

    fixed: ClassVar = (*RowData.fixed, "max_target_length")
    shaped_by: ClassVar = ("max_length", "too_long", "max_target_length")

    def __init__(
        self,
        sample: Literal["translation", "summarization"] = "translation",
        test_files: str | list[str] | None = None,
        train_target_files: str | list[str] | None = None,
        val_target_files: str | list[str] | None = None,
        test_target_files: str | list[str] | None = None,
        source_field: str = "source",
        target_field: str = "target",
        references_field: str | None = None,
        too_long: TooLong = "truncate",
        max_target_length: int | None = None,
        target_tokenizer: str | None = None,
        target_vocab_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            sample=sample, test_files=test_files, train_target_files=train_target_files,
            val_target_files=val_target_files, test_target_files=test_target_files, source_field=source_field,
            target_field=target_field, references_field=references_field, too_long=too_long,
            max_target_length=max_target_length, target_tokenizer=target_tokenizer,
            target_vocab_size=target_vocab_size, **settings,
        )  # fmt: skip
        LENGTH.check("data.max_target_length", max_target_length)
        VOCABULARY.check("data.target_vocab_size", target_vocab_size)
        if target_vocab_size is not None and target_tokenizer is None:
            raise UserError(
                f"data.target_vocab_size: {target_vocab_size}, but sources and targets have one tokenizer. "
                "Set data.target_tokenizer to train, or leave it out"
            )
        self.sample = sample
        self._target: TextTokenizer | None = None
        for part in ("train", "val", "test"):
            sources, targets = (as_list(self.hparams[f"{part}_{kind}"]) for kind in ("files", "target_files"))
            if targets is None:
                continue
            if sources is None:
                raise UserError(f"data.{part}_target_files: there are no sources to them. Set data.{part}_files too")
            for pattern in (*sources, *targets):
                if pattern.startswith("hf:"):
                    raise UserError(f"data.{part}_files: {pattern} has no lines. Leave out data.{part}_target_files")

    @property
    def room(self) -> tuple[int, int]:
        """Source and target tokens in a row."""
        return self.hparams["max_length"], self.hparams["max_target_length"] or self.hparams["max_length"]

    @property
    def limits(self) -> str:
        """The settings of length, with their values."""
        length = self.hparams["max_target_length"]
        return super().limits if length is None else f"{super().limits} or data.max_target_length ({length} tokens)"

    def adopt(self, metadata: ModelMetadata) -> None:
        """Take over the lengths of sources and of targets, which were the same where the model says no other."""
        super().adopt(metadata)
        if metadata.max_length is not None:
            take_over(self.hparams, "max_target_length", metadata.max_target_length)

    # ---- tokenizers

    @property
    def separate(self) -> bool:
        """Whether targets have a tokenizer of their own."""
        return self.hparams[TARGET] is not None

    @property
    def target_tokenizer(self) -> TextTokenizer:
        """The tokenizer of targets, which may be the sources' too."""
        return self.tokenizer if self._target is None else self._target

    @property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        """What checkpoint and run keep, by the names of their settings."""
        return {**super().tokenizers, **({} if self._target is None else {TARGET: self._target})}

    @property
    def columns(self) -> dict[str, TextTokenizer]:
        """The columns of ids, and the tokenizer of each."""
        return {"source": self.tokenizer, "target": self.target_tokenizer}

    def make_tokenizers(self) -> None:
        """Read, or train, the tokenizers."""
        if not self.separate:
            super().make_tokenizers()
            return
        self._target = self._tokenizer_of("target", TARGET, TRAIN, self.hparams["target_vocab_size"])
        self.tokenizer = self._tokenizer_of("source", "tokenizer", None)

    def _tokenizer_of(self, side: str, name: str, train: str | None, vocab_size: int | None = None) -> TextTokenizer:
        if self.hparams[name] != train:
            return TextTokenizer.from_file(self.hparams[name], name)
        texts = lambda: (getattr(pair, side) for pair in self.pairs("train"))  # noqa: E731
        return trained_tokenizer(self, texts, side, vocab_size=vocab_size)

    def setup(self, stage: str) -> None:
        """Load what was prepared; prediction needs the tokenizers only."""
        super().setup(stage)
        if stage == "predict" and self.separate:
            if self.hparams[TARGET] == TRAIN:
                raise UserError("data.target_tokenizer: predict needs the model's. Give --ckpt_path, or its path")
            self._target = TextTokenizer.from_file(self.hparams[TARGET], TARGET)

    def take_tokenizers(self, path: str, stored: dict[str, Any], *, resumes: bool) -> None:
        """Use the tokenizers of a checkpoint; raises UserError if the run `resumes` with other settings of them."""
        super().take_tokenizers(path, stored, resumes=resumes)
        given, there = self.hparams[TARGET], stored.get(TARGET)
        of_own = "one of its own for targets", "Set it to train, which takes the checkpoint's"
        has, fix = ("one tokenizer for sources and targets", "Leave it out") if there is None else of_own
        if resumes and (given is not None) != (there is not None):
            raise UserError(f"data.target_tokenizer: is {given or 'not set'}, but the checkpoint has {has}. {fix}")
        if resumes and given not in (None, TRAIN) and TextTokenizer.from_file(given, TARGET).to_json() != there:
            raise UserError(f"data.target_tokenizer: {given} is another one than the checkpoint's. {fix}")
        self.hparams[TARGET] = None if there is None else path

    # ---- examples

    def key(self, part: Part) -> list[object]:
        """Return the settings of reading, and the target files."""
        targets = self.target_files(part)
        names = ("source_field", "target_field", *(() if part == "train" else ("references_field",)))
        # one by one: their order says which belong together
        sides = {"files": self.files(part), "target_files": targets} if targets else {}
        corpora = [Corpus((p,), setting=f"data.{part}_{side}", suffixes=("",)) for side in sides for p in sides[side]]
        digests = [corpus_digest(corpus, cache_folder(self.hparams["cache_dir"])) for corpus in corpora]
        return [digests, *(self.hparams[name] for name in names)]

    def target_files(self, part: Part) -> list[str] | None:
        """Return the text files of the targets."""
        shared = part == "val" and self.hparams["val_files"] is None
        return given_files(self.hparams, "train" if shared else part, "target_files")

    def texts(self) -> Iterator[str]:
        """Yield sources and targets of the training pairs."""
        return (text for pair in self.pairs("train") for text in (pair.source, pair.target))

    def encode(self, part: Part, notes: Notes) -> Iterator[Example]:
        """Yield the examples, and note how many were cut."""
        before, after = self.tokenizer.template
        begin, end = output_frame(self.target_tokenizer, TARGET if self.separate else "tokenizer")
        frame, target_frame = len(before) + len(after), len(begin) + len(end) - 1  # a target's last is not read
        setting = "data.max_length" if self.hparams["max_target_length"] is None else "data.max_target_length"
        for batch in in_batches(self.pairs(part), ENCODED_TOGETHER):
            sources = self.tokenizer.encode_bare([pair.source for pair in batch])
            targets = self.target_tokenizer.encode_bare([pair.target for pair in batch])
            for pair, source, target in zip(batch, sources, targets, strict=True):
                cut = must_be_cut(self.hparams, pair.where, len(source) + frame, self.room[0])
                cut |= must_be_cut(self.hparams, pair.where, len(target) + target_frame, self.room[1], setting)
                notes.cut += cut
                yield {
                    "source": [*before, *source[: self.room[0] - frame], *after],
                    "target": [*begin, *target[: self.room[1] - target_frame], *end],
                }

    def pairs(self, part: Part) -> Iterator[Pair]:
        """Yield the pairs of a part.

        Raises UserError: files of different length, a missing field (names file and line), or further references are
        set and no validation or test pair has some.
        """
        low, high = self.held_out(part)
        targets = self.target_files(part)
        further = None if part == "train" else self.hparams["references_field"]  # training does not look at them
        if targets is None:
            found = self._records(part, further)
        elif further is None:
            found = (Pair(*line, [line[2]]) for line in parallel_lines(self.files(part), targets, part))
        else:
            raise self._no_references(part, "are lines of text, which have no fields")
        return (pair for pair in found if low <= document_hash(pair.source) < high)

    def _records(self, part: Part, further: str | None) -> Iterator[Pair]:
        source, target = self.hparams["source_field"], self.hparams["target_field"]
        if self.hparams["train_files"] is None and self.hparams[f"{part}_files"] is None:
            source, target = EMBEDDED_FIELDS[self.hparams["sample"]]
        lacking = further is not None
        fields, optional = (source, target), () if further is None else (further,)
        owner = "train" if self.hparams[f"{part}_files"] is None else part
        hint = f"; with data.{owner}_target_files lines of text"
        for where, record in read_records(self.files(part), f"data.{owner}_files", (), fields, optional, hint):
            right = [text_of(where, record, target)]
            if further is not None and has_field(record, further):
                lacking = False
                right += texts_of(where, further, value_of(where, record, further))
            yield Pair(where, text_of(where, record, source), right[0], list(dict.fromkeys(right)))
        if lacking:
            raise self._no_references(part, "have no such field")

    def _no_references(self, part: Part, problem: str) -> UserError:
        field, files = self.hparams["references_field"], ", ".join(self.files(part))
        return UserError(
            f"data.references_field: is {field}, but the {part} pairs ({files}) {problem}. "
            "Name a field that some have, or leave it out"
        )

    # ---- rows

    def needed(self, part: Part) -> np.ndarray:
        """Return the tokens of sources and targets, int64 [N, 2]; the last of a target is not read."""
        return super().needed(part) - np.asarray([0, 1])

    @property
    def collator(self) -> PairCollator:
        """What makes batches of the ids of pairs."""
        return PairCollator(self.room, (self.tokenizer.pad_id, self.target_tokenizer.pad_id))

    def batches_of(self, part: Part, training: bool) -> Make:
        """Return what makes batches of a part."""
        return partial(self.collator.read, self.cache(part), self.packing(part))

    def blank_batch(self, rows: int, *, validation: bool = False) -> PairBatch:
        """Return a batch of padding in the shapes of a real one."""
        return self.collator.blank(rows)

    def sources(
        self, part: Part, batch_size: int, most: int | None = None
    ) -> Iterator[tuple[PredictBatch, list[list[str]]]]:
        """Yield batches of the first `most` sources (None: all), each with its references, longest sources together."""
        pairs = sorted(islice(self.pairs(part), most), key=lambda pair: -len(pair.source))
        for some in in_batches(pairs, batch_size):
            batch, _ = encode_lines([pair.source for pair in some], self.tokenizer, self.room[0], masks=False)
            yield batch, [pair.references for pair in some]

    def inputs(self, files: list[str]) -> Iterator[str]:
        """Yield sources."""
        return (texts[0] for texts in prediction_texts(files, [self.hparams["source_field"]]))

    def encode_inputs(self, inputs: list[str]) -> tuple[PredictBatch, int]:
        """Return sources as a batch, and how many were cut."""
        return encode_lines(inputs, self.tokenizer, self.room[0], masks=False)
