"""Sentences of words with a tag each, out of records and of column files; with the predicate whose roles they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from leanbert.data.batches.batch import IGNORED, WordBatch
from leanbert.data.batches.labelled import Encoded
from leanbert.data.batches.sentences import Mark, Sentence, encode_sentences, word_batch
from leanbert.data.formats.conll import COLUMNS, DOCSTART, is_columns, read_columns
from leanbert.data.formats.corpora import expanded
from leanbert.data.formats.documents import Skipped, document_hash
from leanbert.data.formats.examples import prediction_inputs, prediction_names, read_records
from leanbert.data.formats.fields import Record, has_field, items_of, value_of
from leanbert.data.formats.readers import json_object
from leanbert.data.formats.span_labels import TO_FIND, TagReader
from leanbert.data.labels import parse_list
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.messages import say_once

Tagged = tuple[str, Sentence, list[Any]]
"""("file:line", sentence, tags)."""


@dataclass(frozen=True)
class SentenceReader:
    """How sentences are read.

    `tokens_field`, `labels_field` and, if it is set, `predicate_field` are those of records; `word_column` is that of
    the words in column files that are to be answered, and `columns` reads the others. `named` gives the name of a tag
    that may be a number, with a place for its errors; `numbered` says whether there are such. `mark` is how the model
    sees the predicate; with `find_predicates` sentences in which they are to be found come besides.
    """

    tokens_field: str
    labels_field: str
    predicate_field: str | None
    word_column: int
    columns: Callable[[Sequence[str]], Iterator[Tagged]]
    named: Callable[[str, int | str], str]
    numbered: bool
    mark: Mark = "tokens"
    find_predicates: bool = False

    def read(self, files: list[str], low: float = 0.0, high: float = 1.0) -> Iterator[Tagged]:
        """Yield the sentences whose text hashes to [low, high), with BIO tags; those of column files first."""
        found = self._read(files, low, high)
        return _with_predicates_to_find(found) if self.find_predicates else found

    def texts(self, sentences: Iterator[Tagged]) -> Iterator[str]:
        """Yield each sentence once, of those that follow one another for their predicates."""
        last: list[str] = []
        for _, sentence, _ in sentences:
            if sentence.tokens != last:
                yield " ".join(sentence.tokens)
            last = sentence.tokens

    def encode(self, sentences: list[Sentence], tokenizer: TextTokenizer, length: int) -> list[Encoded]:
        """Encode sentences for rows of `length` tokens."""
        return encode_sentences(sentences, tokenizer, length, self.mark)

    def batch(self, sentences: list[Sentence], tokenizer: TextTokenizer, length: int) -> tuple[WordBatch, int]:
        """Return sentences as a batch to answer, and how many were cut."""
        batch = word_batch(sentences, tokenizer, length, self.mark)
        fitting = (batch.targets != IGNORED).sum(1).tolist()
        return batch, sum(len(s.tokens) > count for s, count in zip(sentences, fitting, strict=True))

    def _read(self, files: list[str], low: float, high: float) -> Iterator[Tagged]:
        tags: dict[str, TagReader] = {}
        for place, sentence, labels in self._records(files):
            if sentence.tokens == [DOCSTART]:
                continue
            if not sentence.tokens:
                raise UserError(f"{place}: a sentence without words. Remove it")
            if len(labels) != len(sentence.tokens):
                raise UserError(f"{place}: {len(labels)} labels for {len(sentence.tokens)} words. Give one for each")
            file = re.sub(r"(:|, row )[0-9]+$", "", place)
            bio = tags.setdefault(file, TagReader()).read(place, [self._tag(place, label) for label in labels])
            if low <= document_hash(" ".join(sentence.tokens)) < high:
                yield place, sentence, bio
        for file, reader in tags.items():
            if reader.scheme != "BIO":
                say_once(f"{file}: tags are {reader.scheme}, and read as the spans that they mean")

    def inputs(self, files: list[str]) -> Iterator[Sentence]:
        """Yield what is to be answered: records and columns as of training, lines of words or of a JSON object."""
        skipped = Skipped()
        optional = [name for name in (self.labels_field, self.predicate_field) if name is not None]
        for file in prediction_names(files):
            if is_columns(file):
                for _, rows in read_columns([file], [self.word_column]):
                    yield Sentence([row[0] for row in rows])
                continue
            for place, found in prediction_inputs([file], [self.tokens_field], optional):
                if isinstance(found, str) and not found.lstrip().startswith("{"):
                    if not skipped.lacks(place, found):
                        yield Sentence(found.split())
                    continue
                record = json_object(place, found) if isinstance(found, str) else found
                yield self._sentence(place, items_of(place, record, self.tokens_field, str), record)
        skipped.tell()

    def _records(self, files: list[str]) -> Iterator[Tagged]:
        names = expanded(files, "data.train_files")
        columns = sorted({name for name in names if is_columns(name, (*COLUMNS, ".txt"))})
        yield from self.columns(columns)
        others = [name for name in names if name not in columns]
        fields = [self.tokens_field, self.labels_field, *([self.predicate_field] if self.predicate_field else [])]
        for place, record in read_records(others, "data.train_files", fields) if others else ():
            for field in (self.tokens_field, self.labels_field):
                if isinstance(record[field], str):
                    record[field] = parse_list(record[field])
            sentence = self._sentence(place, items_of(place, record, self.tokens_field, str), record)
            tags = record[self.labels_field]
            if not (isinstance(tags, list) and any(isinstance(tag, int) for tag in tags)):
                tags = items_of(place, record, self.labels_field, str)
            yield place, sentence, tags

    def _sentence(self, place: str, words: list[str], record: Record) -> Sentence:
        field = self.predicate_field
        found = value_of(place, record, field) if field is not None and has_field(record, field) else None
        return Sentence(words, None if found is None else predicate_place(place, found, len(words)))

    def _tag(self, place: str, tag: Any) -> str:
        """Return the name of a tag, which may be a number."""
        if isinstance(tag, int) and not isinstance(tag, bool) and not self.numbered:
            raise UserError(f"{place}: tag {tag} is a number. Set data.label_names to the names of all, in their order")
        if isinstance(tag, bool) or not isinstance(tag, int | str):
            raise UserError(f"{place}: {tag!r} is no tag. Write a text, as B-PER, or a number (data.label_names)")
        return self.named(place, tag)


def _with_predicates_to_find(sentences: Iterator[Tagged]) -> Iterator[Tagged]:
    """Yield sentences with a predicate, and after all predicates of one the sentence without."""
    before: list[str] = []
    predicates: set[int] = set()
    place = ""
    for place, sentence, labels in sentences:
        if sentence.tokens != before and predicates:
            yield place, Sentence(before), _predicate_tags(len(before), predicates)
            predicates = set()
        before = sentence.tokens
        if sentence.predicate is not None:
            predicates.add(sentence.predicate)
        yield place, sentence, labels
    if predicates:
        yield place, Sentence(before), _predicate_tags(len(before), predicates)


def predicate_place(place: str, value: Any, words: int) -> int:
    """Return the predicate's place. Raises UserError, naming the `place`, if there is no such word."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < words:
        raise UserError(f"{place}: predicate {value!r} is not the place of one of {words} words, 0 to {words - 1}")
    return value


def _predicate_tags(words: int, predicates: set[int]) -> list[str]:
    return [f"B-{TO_FIND}" if place in predicates else "O" for place in range(words)]
