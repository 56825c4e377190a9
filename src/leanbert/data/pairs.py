"""Pairs of a source and a target: sentences and their translations, documents and their summaries.

Letters: B rows, S source tokens of a row, T its target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from leanbert.data.batches.batch import IGNORED, PairBatch, PredictBatch
from leanbert.data.batches.loading import PredictionInputs, encode_lines, in_batches, locate
from leanbert.data.batches.packing import PADDING_DOCUMENT, Packing
from leanbert.data.example_data import ExampleData, Part
from leanbert.data.formats.corpora import Corpus, Skipped, document_hash, no_report
from leanbert.data.formats.examples import has_field, items_of, prediction_texts, read_records, text_of
from leanbert.data.formats.readers import open_binary, whole_lines
from leanbert.data.module import LENGTH, VOCABULARY, as_list
from leanbert.data.samples.embedded import embedded_files
from leanbert.data.store.example_store import Example, ExampleCache
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError

ENCODED_TOGETHER = 1024
"""Pairs whose texts are given to the tokenizer at a time."""
TRAIN = "train"
"""Value of `data.target_tokenizer`: train one."""
TARGET = "target_tokenizer"
EMBEDDED_FIELDS = {"translation": ("source", "target"), "summarization": ("document", "summary")}
"""Fields of source and target in the embedded samples."""


class Pair(NamedTuple):
    """A source and its target, and where they stand; of evaluation all references, the target first."""

    place: str
    source: str
    target: str
    references: list[str]


class PairRows(Dataset[PairBatch]):
    """Packed rows of pairs; the index is an array of stream positions, the item a whole batch.

    The columns of the cache: "source" and "target", ids in their tokenizer's template.
    """

    def __init__(
        self, cache: ExampleCache, packing: Packing, source_length: int, target_length: int, pad_id: int,
        target_pad_id: int, seed: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.packing, self.pad_ids, self.seed = cache, packing, (pad_id, target_pad_id), seed
        self.source_length, self.target_length, self.rows = source_length, target_length, packing.rows

    def __getitem__(self, positions: np.ndarray) -> PairBatch:
        """Return the batch of the rows at `positions`, int64 [B]."""
        rows, _ = locate(positions, self.rows, self.seed)
        blank = blank_pairs(len(rows), self.source_length, self.target_length, *self.pad_ids)
        for place, row in enumerate(rows):
            examples = self.packing.examples(row)
            sources, targets = self.cache.read("source", examples), self.cache.read("target", examples)
            start = begin = 0
            for document, (source, target) in enumerate(zip(sources, targets, strict=True)):
                here = (place, slice(start, start + len(source)))
                blank["input_ids"][here] = source
                blank["position_ids"][here] = np.arange(len(source))
                blank["document_ids"][here] = document
                there = (place, slice(begin, begin + len(target) - 1))
                blank["decoder_input_ids"][there] = target[:-1]
                blank["decoder_position_ids"][there] = np.arange(len(target) - 1)
                blank["decoder_document_ids"][there] = document
                blank["targets"][there] = target[1:]
                start, begin = here[1].stop, there[1].stop
        return PairBatch.from_arrays(blank)


def output_frame(tokenizer: TextTokenizer, name: str) -> tuple[list[int], list[int]]:
    """Return the ids that begin and end an output; raises UserError if the tokenizer `name` puts none."""
    begin, end = tokenizer.template
    if not begin or not end:
        raise UserError(
            f"data.{name}: puts no token before or after a text: nothing to begin and end an output with. "
            "Choose another one"
        )
    return begin, end


def blank_pairs(
    rows: int, source_length: int, target_length: int, pad_id: int, target_pad_id: int
) -> dict[str, np.ndarray]:
    """Return the arrays of a `PairBatch` of padding."""
    source, target = (rows, source_length), (rows, target_length)
    return {
        "input_ids": np.full(source, pad_id, dtype=np.int64),
        "position_ids": np.zeros(source, dtype=np.int64),
        "document_ids": np.full(source, PADDING_DOCUMENT, dtype=np.int64),
        "decoder_input_ids": np.full(target, target_pad_id, dtype=np.int64),
        "decoder_position_ids": np.zeros(target, dtype=np.int64),
        "decoder_document_ids": np.full(target, PADDING_DOCUMENT, dtype=np.int64),
        "targets": np.full(target, IGNORED, dtype=np.int64),
    }


class PairData(ExampleData):
    """Sources and targets, as two text files with a line each, or as fields of .jsonl, .csv and .tsv files.

    Args:
        sample: The embedded sample that is used without files: a synthetic language to translate into, or docstrings
            and their first lines.
        train_target_files: Text files of the targets, line by line to `train_files`; unset: `train_files` have both.
        val_target_files: The same of validation.
        test_target_files: The same of the test.
        source_field: Field of the source.
        target_field: Field of the target.
        references_field: Field with a list of further right outputs, for evaluation; a line may do without.
        max_target_length: Target tokens in a row. Default: max_length.
        target_tokenizer: Tokenizer of the targets alone, as of `tokenizer`; train: that of model.init_from if it has
            one, else one is trained on the training targets, and the sources' on sources. Default: one for both.
        target_vocab_size: Entries of a trained tokenizer of the targets, at most. Default: vocab_size.
        settings: See `ExampleData`.

    """

    dtypes: ClassVar = {"source": "int32", "target": "int32"}
    lengths: ClassVar = ("source", "target")
    fixed: ClassVar = (*ExampleData.fixed, "max_target_length")

    def __init__(
        self,
        sample: Literal["translation", "summarization"] = "translation",
        train_target_files: str | list[str] | None = None,
        val_target_files: str | list[str] | None = None,
        test_target_files: str | list[str] | None = None,
        source_field: str = "source",
        target_field: str = "target",
        references_field: str | None = None,
        max_target_length: int | None = None,
        target_tokenizer: str | None = None,
        target_vocab_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(
            sample=sample, train_target_files=train_target_files, val_target_files=val_target_files,
            test_target_files=test_target_files, source_field=source_field, target_field=target_field,
            references_field=references_field, max_target_length=max_target_length, target_tokenizer=target_tokenizer,
            target_vocab_size=target_vocab_size, **settings,
        )  # fmt: skip
        LENGTH.check("data.max_target_length", max_target_length)
        VOCABULARY.check("data.target_vocab_size", target_vocab_size)
        if target_vocab_size is not None and target_tokenizer is None:
            raise UserError(
                f"data.target_vocab_size: {target_vocab_size}, but sources and targets have one tokenizer. "
                "Set data.target_tokenizer to train, or leave it out"
            )
        self._target: TextTokenizer | None = None
        for part in ("train", "val", "test"):
            sources, targets = (as_list(self.hparams[f"{part}_{kind}"]) for kind in ("files", "target_files"))
            if targets is not None and sources is None:
                raise UserError(f"data.{part}_target_files: there are no sources to them. Set data.{part}_files too")
            for pattern in (*(sources or ()), *targets) if targets is not None else ():
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

    # ---- tokenizers

    @property
    def separate(self) -> bool:
        """Whether targets have a tokenizer of their own."""
        return self.hparams[TARGET] is not None

    @property
    def target_tokenizer(self) -> TextTokenizer:
        """The tokenizer of targets, which may be that of sources."""
        return self.tokenizer if self._target is None else self._target

    @property
    def tokenizers(self) -> dict[str, TextTokenizer]:
        """What checkpoint and run keep, by the names of their settings."""
        return {**super().tokenizers, **({} if self._target is None else {TARGET: self._target})}

    def tokenizer_of(self, column: str) -> TextTokenizer:
        """Return the tokenizer of a side."""
        return self.tokenizer if column == "source" else self.target_tokenizer

    def prepare(self) -> Any:
        """Make, or find, the tokenizers and the caches of training and validation examples."""
        if self.separate and not self.caches:
            self._target = self._make_target_tokenizer()
        return super().prepare()

    def setup(self, stage: str) -> None:
        """Load what was prepared; prediction needs the tokenizers only."""
        super().setup(stage)
        if stage == "predict" and self.separate:
            if self.hparams[TARGET] == TRAIN:
                raise UserError("data.target_tokenizer: predict needs the model's. Give --ckpt_path, or its path")
            self._target = self._make_target_tokenizer()

    def take_tokenizers(self, path: str, stored: dict[str, Any], *, resumes: bool) -> None:
        """Use the tokenizers of a checkpoint; raises UserError if the run `resumes` with other settings of them."""
        super().take_tokenizers(path, stored, resumes=resumes)
        given, there = self.hparams[TARGET], stored.get(TARGET)
        if resumes and (given is not None) != (there is not None):
            has, fix = ("one tokenizer for sources and targets", "Leave it out")
            if there is not None:
                has, fix = ("one of its own for targets", "Set it to train, which takes the checkpoint's")
            raise UserError(f"data.target_tokenizer: is {given or 'not set'}, but the checkpoint has {has}. {fix}")
        if resumes and given not in (None, TRAIN) and TextTokenizer.from_file(given, TARGET).to_json() != there:
            raise UserError(
                f"data.target_tokenizer: {given} is another one than the checkpoint's. "
                "Set it to train, which takes the checkpoint's"
            )
        self.hparams[TARGET] = None if there is None else path

    def _tokenizer(self) -> TextTokenizer:
        if not self.separate or self.hparams["tokenizer"] is not None:
            return super()._tokenizer()
        return self.trained(lambda: (pair.source for pair in self.pairs("train")), self.hparams["vocab_size"], "source")

    def _make_target_tokenizer(self) -> TextTokenizer:
        given, size = self.hparams[TARGET], self.hparams["target_vocab_size"] or self.hparams["vocab_size"]
        if given == TRAIN:
            return self.trained(lambda: (pair.target for pair in self.pairs("train")), size, "target")
        return TextTokenizer.from_file(given, TARGET)

    # ---- examples

    def embedded(self, cache_dir: Path) -> dict[Part, Path]:
        """Return the sample."""
        return embedded_files(self.hparams["sample"], cache_dir)

    def key(self, part: Part) -> list[Any]:
        """Return the settings of reading, and the target files."""
        targets = self.target_files(part)
        names = ("source_field", "target_field", *(() if part == "train" else ("references_field",)))
        # one by one: their order says which belong together
        sides = {"files": self.files(part), "target_files": targets} if targets else {}
        digests = [self._digest([p], f"data.{part}_{side}") for side, patterns in sides.items() for p in patterns]
        return [digests, self.room, *(self.hparams[name] for name in names)]

    def target_files(self, part: Part) -> list[str] | None:
        """Return the text files of the targets."""
        shared = part == "val" and self.hparams["val_files"] is None
        return self._given("train" if shared else part, "target_files")

    def texts(self, files: list[str]) -> Iterator[str]:
        """Yield sources and targets of the training pairs."""
        for pair in self.pairs("train"):
            yield from (pair.source, pair.target)

    def encode(self, files: list[str], part: Part, facts: dict[str, Any]) -> Iterator[Example]:
        """Yield the examples; `facts` get "cut", the number of pairs that were cut."""
        before, after = self.tokenizer.template
        begin, end = output_frame(self.target_tokenizer, TARGET if self.separate else "tokenizer")
        frame = len(before) + len(after)
        target_frame = len(begin) + len(end) - 1  # a target is read up to its last token
        setting = "data.max_length" if self.hparams["max_target_length"] is None else "data.max_target_length"
        facts["cut"] = 0
        for batch in in_batches(self.pairs(part), ENCODED_TOGETHER):
            sources = self.tokenizer.encode_bare([pair.source for pair in batch])
            targets = self.target_tokenizer.encode_bare([pair.target for pair in batch])
            for pair, source, target in zip(batch, sources, targets, strict=True):
                cut = self.fit_length(pair.place, len(source) + frame)
                cut |= self.fit_length(pair.place, len(target) + target_frame, self.room[1], setting)
                facts["cut"] += cut
                yield {
                    "source": [*before, *source[: self.room[0] - frame], *after],
                    "target": [*begin, *target[: self.room[1] - target_frame], *end],
                }

    def pairs(self, part: Part) -> Iterator[Pair]:
        """Yield the pairs of a part.

        Raises:
            UserError: Files of different length, a missing field; names file and line.
            UserError: No validation or test pair has the further references that are set.
        """
        low, high = self.held_out(part)
        targets = self.target_files(part)
        if targets is not None and self._further(part) is not None:
            raise self._no_references(part, "are lines of text, which have no fields")
        found = self._records(part) if targets is None else _lines(self.files(part), targets, part)
        for pair in found:
            if low <= document_hash(pair.source) < high:
                yield pair

    def _records(self, part: Part) -> Iterator[Pair]:
        source, target = self.hparams["source_field"], self.hparams["target_field"]
        if self.hparams["train_files"] is None and self.hparams[f"{part}_files"] is None:
            source, target = EMBEDDED_FIELDS[self.hparams["sample"]]
        further = self._further(part)
        lacking = further is not None
        optional = () if further is None else (further,)
        for place, record in read_records(self.files(part), f"data.{part}_files", (), (source, target), optional):
            own = text_of(place, record, target)
            more: list[str] = []
            if further is not None and has_field(record, further):
                lacking, more = False, items_of(place, record, further, str)
            yield Pair(place, text_of(place, record, source), own, list(dict.fromkeys([own, *more])))
        if lacking:
            raise self._no_references(part, "have no such field")

    def _further(self, part: Part) -> str | None:
        """Return the field of further references, which training does not look at."""
        return None if part == "train" else self.hparams["references_field"]

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

    def training_rows(self) -> PairRows:
        """Return rows in an order that changes with each epoch."""
        return self._rows("train", self.hparams["seed"])

    def evaluation_rows(self, part: Any) -> PairRows:
        """Return rows in the order of the files."""
        return self._rows(part, None)

    def blank_batch(self, rows: int, *, validation: bool = False) -> PairBatch:
        """Return a batch of padding in the shapes of a real one."""
        arrays = blank_pairs(rows, *self.room, self.tokenizer.pad_id, self.target_tokenizer.pad_id)
        return PairBatch.from_arrays(arrays)

    def sources(
        self, part: Part, batch_size: int, most: int | None = None
    ) -> Iterator[tuple[PredictBatch, list[list[str]]]]:
        """Yield batches of the first `most` sources (None: all), each with its references, longest sources together."""
        pairs = sorted(islice(self.pairs(part), most), key=lambda pair: -len(pair.source))
        for some in in_batches(pairs, batch_size):
            batch, _ = encode_lines([pair.source for pair in some], self.tokenizer, self.room[0], masks=False)
            yield batch, [pair.references for pair in some]

    def prediction_batches(self, files: list[str], batch_size: int) -> PredictionInputs:
        """Return sources."""
        length = self.room[0]
        return PredictionInputs(
            lambda: (texts[0] for texts in prediction_texts(files, [self.hparams["source_field"]])),
            lambda texts: encode_lines(texts, self.tokenizer, length, masks=False),
            batch_size,
            length,
        )

    def _rows(self, part: Part, seed: int | None) -> PairRows:
        pad_ids = (self.tokenizer.pad_id, self.target_tokenizer.pad_id)
        return PairRows(self.cache(part), self.packing(part), *self.room, *pad_ids, seed)


def _lines(sources: list[str], targets: list[str], part: Part) -> Iterator[Pair]:
    """Yield line by line pairs of text files, in the order in which they are given. Raises UserError if one is longer.

    Any name will do, such as train.en: they are lines of text. Pairs with a blank side are left out, and counted.
    """
    here, there = _in_order(sources, f"data.{part}_files"), _in_order(targets, f"data.{part}_target_files")
    if len(here) != len(there):
        raise UserError(f"data.{part}_target_files: {len(there)} files for {len(here)} of sources. Give one for each")
    skipped = Skipped()
    for source, target in zip(here, there, strict=True):
        for one, other in zip_longest(_read(source), _read(target)):
            if one is None or other is None:
                longer, place = (source, one) if other is None else (target, other)
                raise UserError(
                    f"{longer}:{place[0]}: the other file ({target if other is None else source}) has no such line. "
                    "Give files with a line for each pair"
                )
            pair = Pair(f"{source}:{one[0]}", one[1], other[1], [other[1]])
            if not skipped.lacks(pair.place, pair.source, pair.target):
                yield pair
    skipped.tell()


def _in_order(patterns: list[str], setting: str) -> list[Path]:
    return [path for pattern in patterns for path in Corpus((pattern,), setting=setting, suffixes=("",)).files]


def _read(path: Path) -> Iterator[tuple[int, str]]:
    with open_binary(path, no_report) as stream:
        for number, line in whole_lines(stream, str(path)):
            yield number, line.rstrip("\n")
