"""Sentences of words with a tag each: named entities and the like, and the roles of a predicate's arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from leanbert.data.batches.batch import IGNORED, WordBatch
from leanbert.data.batches.loading import PredictionInputs, in_batches, pad_rows
from leanbert.data.example_data import Part
from leanbert.data.formats.conll import COLUMNS, DOCSTART, is_columns, read_columns, read_roles
from leanbert.data.formats.corpora import Corpus, Skipped, document_hash
from leanbert.data.formats.examples import Record, has_field, items_of, prediction_inputs, read_records, value_of
from leanbert.data.formats.readers import json_object
from leanbert.data.formats.span_labels import PREDICATE, TO_FIND, TagReader
from leanbert.data.labelled import LabelledData
from leanbert.data.labels import parse_list
from leanbert.data.samples.embedded import embedded_files
from leanbert.data.store.example_store import Example
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.messages import say, say_once
from leanbert.models.packed_inputs import PackedInputs
from leanbert.ranges import WHOLE, Range

Mark = Literal["tokens", "segments"]
"""How the predicate is marked in the input: between two separator tokens, or by segment 1."""

ENCODED_TOGETHER = 256
"""Sentences whose words are given to the tokenizer at a time."""


class Sentence(NamedTuple):
    """Words and the place of their predicate; None: there is none, or it is to be found."""

    tokens: list[str]
    predicate: int | None = None


class EncodedSentence(NamedTuple):
    """Ids and segments of a sentence in the tokenizer's template, and the places of its words' first pieces.

    `needed` is the number of tokens of the whole sentence; words that did not fit are not among them.
    """

    ids: list[int]
    segments: list[int]
    places: list[int]
    needed: int


def encode_sentences(
    sentences: Sequence[Sentence], tokenizer: TextTokenizer, length: int, mark: Mark = "tokens"
) -> list[EncodedSentence]:
    """Encode sentences word by word; of one that needs more than `length` tokens the last words are left out."""
    pieces = iter(tokenizer.encode_words([word for sentence in sentences for word in sentence.tokens]))
    return [
        _encode(sentence, [next(pieces) for _ in sentence.tokens], tokenizer, length, mark) for sentence in sentences
    ]


def _encode(
    sentence: Sentence, pieces: list[list[int]], tokenizer: TextTokenizer, length: int, mark: Mark
) -> EncodedSentence:
    before, after = tokenizer.template
    separator = [tokenizer.separator_id] if mark == "tokens" and sentence.predicate is not None else []
    needed = len(before) + sum(map(len, pieces)) + 2 * len(separator) + len(after)
    ids, segments, index = list(before), [0] * len(before), []
    for number, piece in enumerate(pieces):
        is_predicate = number == sentence.predicate
        added = [*separator, *piece, *separator] if is_predicate else piece
        if len(ids) + len(added) + len(after) > length:
            break
        index.append(len(ids) + (len(separator) if is_predicate else 0))
        ids += added
        segments += [int(is_predicate and mark == "segments")] * len(added)
    return EncodedSentence([*ids, *after], [*segments, *[0] * len(after)], index, needed)


class WordData(LabelledData):
    """Sentences of words with a tag each: what tagging and semantic role labelling share.

    Args:
        tokens_field: JSON field of the list of words.
        labels_field: JSON field of the list of tags.
        word_column: Column of the word in .conll files, counted from 0.
        settings: See `LabelledData`.

    """

    dtypes: ClassVar = {**LabelledData.dtypes, "cut": "int32"}
    counts_unknown: ClassVar = True

    def __init__(
        self, tokens_field: str = "tokens", labels_field: str = "labels", word_column: int = 0, **settings: Any
    ) -> None:
        WHOLE.check("data.word_column", word_column)
        super().__init__(tokens_field=tokens_field, labels_field=labels_field, word_column=word_column, **settings)

    @property
    def mark(self) -> Mark:
        """How the predicate is marked, if there is one."""
        return "tokens"

    def embedded(self, cache_dir: Path) -> dict[Part, Path]:
        """Return synthetic sentences, whose roles are found without a predicate given."""
        return embedded_files("srl", cache_dir)

    def key(self, part: Part) -> list[Any]:
        """Return the settings of reading, and whether words that do not fit count."""
        names = ("tokens_field", "labels_field", "word_column", "label_names")
        return [*(self.hparams[name] for name in names), part != "train"]

    def places(self, part: Part) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield ("file:line", tags) of the sentences of a part."""
        return ((place, labels) for place, _, labels in self.read(self.files(part), *self.held_out(part)))

    def texts(self, files: list[str]) -> Iterator[str]:
        """Yield each training sentence once."""
        low, high = self.held_out("train")
        last: list[str] = []
        for _, sentence, _ in self.read(files, low, high):
            if sentence.tokens != last:
                yield " ".join(sentence.tokens)
            last = sentence.tokens

    def encode(self, files: list[str], part: Part, facts: dict[str, Any]) -> Iterator[Example]:
        """Yield the examples; `facts` get "labels", and how many sentences ("cut") and words ("cut_words") were cut."""
        known: dict[str, int] = {}
        facts["cut"] = facts["cut_words"] = 0
        for batch in in_batches(self.read(files, *self.held_out(part)), ENCODED_TOGETHER):
            sentences = [sentence for _, sentence, _ in batch]
            encoded = encode_sentences(sentences, self.tokenizer, self.hparams["max_length"], self.mark)
            for (place, _, labels), (ids, segments, index, needed) in zip(batch, encoded, strict=True):
                facts["cut"] += self.fit_length(place, needed)
                facts["cut_words"] += len(labels) - len(index)
                used = labels if part != "train" else labels[: len(index)]  # those of training are not learnt
                targets = [known.setdefault(label, len(known)) for label in used]
                yield {
                    "ids": ids, "segments": segments, "index": index, "targets": targets[: len(index)],
                    "cut": targets[len(index) :],
                }  # fmt: skip
        facts["labels"] = list(known)

    def tell(self, part: Part, facts: Mapping[str, Any]) -> None:
        """Say how many sentences were cut, and what that does to the score."""
        super().tell(part, facts)
        if part != "train" and facts["cut_words"]:
            say(f"data.{part}_files: {facts['cut_words']:,} words of them are not read: their spans count as missed")

    def prediction_batches(self, files: list[str], batch_size: int) -> PredictionInputs:
        """Return sentences: records and columns as of training, lines with spaces between words or a JSON object."""
        length = self.hparams["max_length"]

        def encode(sentences: list[Sentence]) -> tuple[WordBatch, int]:
            batch = word_batch(sentences, self.tokenizer, length, self.mark)
            fitting = (batch.targets != IGNORED).sum(1).tolist()
            return batch, sum(len(s.tokens) > count for s, count in zip(sentences, fitting, strict=True))

        return PredictionInputs(lambda: self._to_label(files), encode, batch_size, length)

    def _to_label(self, files: list[str]) -> Iterator[Sentence]:
        skipped = Skipped()
        for file in _each("data.predict_files", files):
            if is_columns(file):
                for _, rows in read_columns([file], [self.hparams["word_column"]]):
                    yield Sentence([row[0] for row in rows])
                continue
            for place, found in prediction_inputs([file], [self.hparams["tokens_field"]], self.fields):
                if isinstance(found, str) and not found.lstrip().startswith("{"):
                    if not skipped.lacks(place, found):
                        yield Sentence(found.split())
                    continue
                record = json_object(place, found) if isinstance(found, str) else found
                yield self._sentence(place, items_of(place, record, self.hparams["tokens_field"], str), record)
        skipped.tell()

    def read(self, files: list[str], low: float, high: float) -> Iterator[tuple[str, Sentence, list[str]]]:
        """Yield ("file:line", sentence, tags) of the sentences whose text hashes to [low, high)."""
        tags: dict[str, TagReader] = {}
        for place, sentence, labels in self._records(files):
            if sentence.tokens == [DOCSTART]:
                continue
            self._check(place, sentence, labels)
            file = re.sub(r"(:|, row )[0-9]+$", "", place)
            bio = tags.setdefault(file, TagReader()).read(place, [self._tag(place, label) for label in labels])
            if low <= document_hash(" ".join(sentence.tokens)) < high:
                yield place, sentence, bio
        for file, reader in tags.items():
            if reader.scheme != "BIO":
                say_once(f"{file}: tags are {reader.scheme}, and read as the spans that they mean")

    def _records(self, files: list[str]) -> Iterator[tuple[str, Sentence, list[Any]]]:
        """Yield ("file:line", sentence, tags as they are written): those of column files first."""
        each = list(_each("data.train_files", files))
        columns = [file for file in each if is_columns(file, (*COLUMNS, ".txt"))]
        yield from self._columns(columns)
        tokens, labels = self.hparams["tokens_field"], self.hparams["labels_field"]
        if others := [file for file in each if file not in columns]:
            for place, record in read_records(others, "data.train_files", self.fields):
                for field in (tokens, labels):
                    if isinstance(record[field], str):
                        record[field] = parse_list(record[field])
                words = items_of(place, record, tokens, str)
                yield place, self._sentence(place, words, record), _tags(place, record, labels)

    def _tag(self, place: str, tag: Any) -> str:
        """Return the name of a tag, which may be a number."""
        if isinstance(tag, int) and not isinstance(tag, bool) and self.hparams["label_names"] is None:
            raise UserError(f"{place}: tag {tag} is a number. Set data.label_names to the names of all, in their order")
        if isinstance(tag, bool) or not isinstance(tag, int | str):
            raise UserError(f"{place}: {tag!r} is no tag. Write a text, as B-PER, or a number (data.label_names)")
        return self.named(place, tag)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that each record has."""
        return self.hparams["tokens_field"], self.hparams["labels_field"]

    def _columns(self, files: list[str]) -> Iterator[tuple[str, Sentence, list[str]]]:
        """Yield what `_records` does, out of .conll files."""
        raise NotImplementedError

    def _sentence(self, place: str, words: list[str], record: Record) -> Sentence:
        return Sentence(words)

    def _check(self, place: str, sentence: Sentence, labels: list[str]) -> None:
        if not sentence.tokens:
            raise UserError(f"{place}: a sentence without words. Remove it")
        if len(labels) != len(sentence.tokens):
            raise UserError(f"{place}: {len(labels)} labels for {len(sentence.tokens)} words. Give one for each")


class TokenLabelData(WordData):
    """Sentences of words with a BIO tag each, such as named entities: .jsonl, or .conll files of columns.

    Args:
        tokens_field: JSON field of the list of words.
        labels_field: JSON field of the list of tags.
        word_column: Column of the word in .conll files, counted from 0.
        label_column: Column of the tag in .conll files; negative ones count from the last.
        settings: See `LabelledData`.

    """

    def __init__(self, label_column: int = -1, **settings: Any) -> None:
        Range(whole=True).check("data.label_column", label_column)
        super().__init__(label_column=label_column, **settings)

    def key(self, part: Part) -> list[Any]:
        """Return the settings of reading."""
        return [*super().key(part), self.hparams["label_column"]]

    def _columns(self, files: list[str]) -> Iterator[tuple[str, Sentence, list[str]]]:
        for place, rows in read_columns(files, (self.hparams["word_column"], self.hparams["label_column"])):
            yield place, Sentence([row[0] for row in rows]), [row[1] for row in rows]


class SemanticRoleData(WordData):
    """Sentences with a predicate and the BIO tags of its arguments: .jsonl, or .conll files as of CoNLL-2005 and 2012.

    Args:
        tokens_field: JSON field of the list of words.
        labels_field: JSON field of the list of tags.
        predicate_field: JSON field of the predicate's place among the words.
        mark: How the model sees the predicate: between two separator tokens, or by segment 1 (with an encoder that
            has segments).
        find_predicates: Train also to find the predicates, in sentences without a mark, so that `predict` takes plain
            text.
        word_column: Column of the word in .conll files, counted from 0: 3 in CoNLL-2012, 0 in CoNLL-2005.
        role_columns: First column of roles in .conll files, one column for each predicate, in brackets as (A0* and *).
        last_column: Whether the last column holds roles as well (CoNLL-2005), or coreference (CoNLL-2012).
        settings: See `LabelledData`.

    """

    fixed: ClassVar = (*LabelledData.fixed, "mark", "find_predicates")

    def __init__(
        self,
        predicate_field: str = "predicate",
        mark: Mark = "tokens",
        find_predicates: bool = True,
        word_column: int = 3,
        role_columns: int = 11,
        last_column: bool = False,
        **settings: Any,
    ) -> None:
        WHOLE.check("data.role_columns", role_columns)
        super().__init__(
            predicate_field=predicate_field, mark=mark, find_predicates=find_predicates, word_column=word_column,
            role_columns=role_columns, last_column=last_column, **settings,
        )  # fmt: skip

    @property
    def mark(self) -> Mark:
        """How the predicate is marked."""
        return self.hparams["mark"]

    def key(self, part: Part) -> list[Any]:
        """Return the settings of reading."""
        names = ("predicate_field", "mark", "find_predicates", "role_columns", "last_column")
        return [*super().key(part), *(self.hparams[name] for name in names)]

    def read(self, files: list[str], low: float, high: float) -> Iterator[tuple[str, Sentence, list[str]]]:
        """Yield sentences with a predicate, and after all predicates of one the sentence without."""
        before: list[str] = []
        predicates: set[int] = set()
        place = ""
        for place, sentence, labels in super().read(files, low, high):
            if sentence.tokens != before and predicates:
                yield place, Sentence(before), predicate_tags(len(before), predicates)
                predicates = set()
            before = sentence.tokens
            if self.hparams["find_predicates"] and sentence.predicate is not None:
                predicates.add(sentence.predicate)
            yield place, sentence, labels
        if predicates:
            yield place, Sentence(before), predicate_tags(len(before), predicates)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that each record has."""
        return (*super().fields, self.hparams["predicate_field"])

    def _sentence(self, place: str, words: list[str], record: Record) -> Sentence:
        field = self.hparams["predicate_field"]
        predicate = value_of(place, record, field) if has_field(record, field) else None
        return Sentence(words, None if predicate is None else predicate_place(place, predicate, len(words)))

    def _columns(self, files: list[str]) -> Iterator[tuple[str, Sentence, list[str]]]:
        word, first, last = (self.hparams[name] for name in ("word_column", "role_columns", "last_column"))
        for place, words, labels in read_roles(files, word, first, last):
            if f"B-{PREDICATE}" not in labels:
                raise UserError(f"{place}: no (V*) in a column of roles. Set data.role_columns to the first of them")
            yield place, Sentence(words, labels.index(f"B-{PREDICATE}")), labels


def _each(setting: str, files: Sequence[str]) -> Iterator[str]:
    """Yield the files and data sets of patterns, and "-", in their order."""
    for file in files:
        corpus = None if file == "-" else Corpus((file,), setting=setting, suffixes=("",))
        yield from ["-"] if corpus is None else [*map(str, corpus.files), *corpus.datasets]


def _tags(place: str, record: Record, field: str) -> list[Any]:
    """Return the tags of a sentence, names or numbers. Raises UserError, naming the `place`, if there are none."""
    found = record[field]
    if isinstance(found, list) and any(isinstance(tag, int) for tag in found):
        return found
    return items_of(place, record, field, str)


def predicate_tags(words: int, predicates: set[int]) -> list[str]:
    """Return the tags of a sentence in which predicates are to be found."""
    return [f"B-{TO_FIND}" if place in predicates else "O" for place in range(words)]


def predicate_place(place: str, value: Any, words: int) -> int:
    """Return the predicate's place. Raises UserError, naming the `place`, if there is no such word."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < words:
        raise UserError(f"{place}: predicate {value!r} is not the place of one of {words} words, 0 to {words - 1}")
    return value


def word_batch(sentences: Sequence[Sentence], tokenizer: TextTokenizer, length: int, mark: Mark) -> WordBatch:
    """Return sentences, one a row, as a padded batch; words that do not fit into `length` have no target."""
    encoded = encode_sentences(sentences, tokenizer, length, mark)
    ids, positions, documents = pad_rows([sentence.ids for sentence in encoded], tokenizer.pad_id)
    segments, _, _ = pad_rows([sentence.segments for sentence in encoded], 0)
    index, _, real = pad_rows([sentence.places for sentence in encoded], 0)
    targets = np.where(real == 0, 0, IGNORED)
    inputs = PackedInputs(*map(torch.from_numpy, (ids, positions, documents, segments)))
    return WordBatch(inputs, list(sentences), torch.from_numpy(index), torch.from_numpy(targets))
