"""Sentences of words with a tag each, out of records and of column files; with the predicate whose roles they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from leanbert.data.batches.batch import IGNORED, WordBatch
from leanbert.data.batches.labelled import Encoded
from leanbert.data.batches.sentences import Mark, Sentence, encode_sentences, word_batch
from leanbert.data.batches.texts import given_list
from leanbert.data.formats.conll import COLUMNS, DOCSTART, is_columns, looks_tagged, read_columns
from leanbert.data.formats.corpora import expanded
from leanbert.data.formats.documents import Skipped, document_hash
from leanbert.data.formats.examples import prediction_inputs, prediction_names, read_records
from leanbert.data.formats.fields import Record, has_field, texts_of, value_of
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
    """How sentences are read, and shown to the model, as the `settings` of the data module say.

    `columns` reads column files; `named` gives the name of a tag that may be a number, with where it stands, for its
    errors.
    """

    settings: Mapping[str, Any]
    columns: Callable[[Sequence[str]], Iterator[Tagged]]
    named: Callable[[str, int | str], str]

    @property
    def mark(self) -> Mark:
        """How the model sees the predicate."""
        return self.settings.get("mark", "tokens")

    def read(self, files: list[str], low: float = 0.0, high: float = 1.0) -> Iterator[Tagged]:
        """Yield the sentences whose text hashes to [low, high), with BIO tags; column files come first."""
        found = self._read(files, low, high)
        return _with_predicates_to_find(found) if self.settings.get("find_predicates") else found

    def texts(self, sentences: Iterator[Tagged]) -> Iterator[str]:
        """Yield each sentence once, where it comes again for another predicate."""
        return (" ".join(tokens) for tokens, _ in groupby(sentence.tokens for _, sentence, _ in sentences))

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
        for where, sentence, labels in self._records(files):
            if sentence.tokens == [DOCSTART]:
                continue
            if not sentence.tokens:
                raise UserError(f"{where}: a sentence without words. Remove it")
            if len(labels) != len(sentence.tokens):
                raise UserError(f"{where}: {len(labels)} labels for {len(sentence.tokens)} words. Give one for each")
            file = re.sub(r"(:|, row )[0-9]+$", "", where)
            bio = tags.setdefault(file, TagReader()).read(where, [self._tag(where, label) for label in labels])
            if sentence.predicate is not None and "B-V" in bio and bio[sentence.predicate] not in ("B-V", "I-V"):
                raise UserError(
                    f"{where}: predicate {sentence.predicate}, counted from 0, is {bio[sentence.predicate]}, but "
                    f"word {bio.index('B-V')} is B-V. Correct one of them"
                )
            if low <= document_hash(" ".join(sentence.tokens)) < high:
                yield where, sentence, bio
        for file, reader in tags.items():
            if reader.scheme != "BIO":
                say_once(f"{file}: tags are {reader.scheme}, and read as the spans that they mean")

    def inputs(self, files: list[str]) -> Iterator[Sentence]:
        """Yield what is to be answered: records and columns as of training, lines of words or of a JSON object."""
        skipped = Skipped()
        tokens, *others = self._fields()
        for name in prediction_names(files):
            if _has_columns(name):
                yield from (
                    Sentence([w for (w,) in rows]) for _, rows in read_columns([name], [self.settings["word_column"]])
                )
                continue
            for where, found in prediction_inputs([name], [tokens], others):
                if isinstance(found, str) and not found.lstrip().startswith("{"):
                    if not skipped.lacks(where, found):
                        yield Sentence(found.split())
                    continue
                yield self._sentence(where, json_object(where, found) if isinstance(found, str) else found)
        skipped.tell()

    def _records(self, files: list[str]) -> Iterator[Tagged]:
        names = expanded(files, "data.train_files")
        columns = sorted({name for name in names if is_columns(name, (*COLUMNS, ".txt"))})
        yield from self.columns(columns)
        others = [name for name in names if name not in columns]
        fields = self._fields()
        for name in others:
            if is_columns(name, (".tsv",)) and looks_tagged(name):
                raise UserError(f"{name}: has a word and its tag in each line. Let its name end in .conll")
        for where, record in read_records(others, "data.train_files", fields) if others else ():
            sentence, tags = self._sentence(where, record), _listed(where, record, fields[1])
            if not (isinstance(tags, list) and any(isinstance(tag, int) for tag in tags)):
                tags = texts_of(where, fields[1], tags)
            yield where, sentence, tags

    def _fields(self) -> list[str]:
        """Return the fields of words, of tags and, where there is one, of the predicate."""
        names = (self.settings.get(f"{kind}_field") for kind in ("tokens", "labels", "predicate"))
        return [name for name in names if name]

    def _sentence(self, where: str, record: Record) -> Sentence:
        tokens, _, *predicate = self._fields()
        words = texts_of(where, tokens, _listed(where, record, tokens))
        found = value_of(where, record, predicate[0]) if predicate and has_field(record, predicate[0]) else None
        return Sentence(words, None if found is None else predicate_place(where, found, len(words)))

    def _tag(self, where: str, tag: object) -> str:
        """Return the name of a tag, which may be a number."""
        if isinstance(tag, bool) or not isinstance(tag, int | str):
            raise UserError(f"{where}: {tag!r} is no tag. Write a text, as B-PER, or a number (data.label_names)")
        if isinstance(tag, int) and self.settings["label_names"] is None:
            raise UserError(f"{where}: tag {tag} is a number. Set data.label_names to the names of all, in their order")
        return self.named(where, tag)


def _has_columns(name: str) -> bool:
    """Return whether a file to answer has columns; one of text may, as in training, and then a line says so."""
    tagged = is_columns(name, (".txt",)) and looks_tagged(name)
    if tagged:
        say_once(f"{name}: each line ends in a tag, and is a word as in training. Else give it as .jsonl")
    return tagged or is_columns(name)


def _listed(where: str, record: Record, field: str) -> object:
    """Return what a field holds, of a table's cell the list that is written there."""
    value = value_of(where, record, field)
    return parse_list(value) if isinstance(value, str) else value


def _with_predicates_to_find(sentences: Iterator[Tagged]) -> Iterator[Tagged]:
    """Yield sentences with a predicate, and after all predicates of one the sentence without."""
    for _, group in groupby(sentences, key=lambda tagged: tagged[1].tokens):
        predicates = set()
        for where, sentence, labels in group:
            predicates.add(sentence.predicate)
            yield where, sentence, labels
        if predicates - {None}:
            tags = [f"B-{TO_FIND}" if place in predicates else "O" for place in range(len(sentence.tokens))]
            yield where, Sentence(sentence.tokens), tags


def given_sentences(values: Sequence[Any]) -> list[Sentence]:
    """Return the sentences that a program gives: texts, lists of words, or `{"tokens": [...], "predicate": 1}`.

    Raises `UserError`, naming the sentence by its number, if a predicate is none of its words.
    """
    return [_given_sentence(f"sentence {number}", value) for number, value in enumerate(given_list(values))]


def _given_sentence(where: str, value: Any) -> Sentence:
    if isinstance(value, str):
        return Sentence(value.split())
    if not isinstance(value, Mapping):
        return Sentence(_given_words(where, value))
    if "tokens" not in value:
        raise UserError(f'{where}: no "tokens" in it. Give the list of words')
    tokens, predicate = _given_words(where, value["tokens"]), value.get("predicate")
    return Sentence(tokens, None if predicate is None else predicate_place(where, predicate, len(tokens)))


def _given_words(where: str, value: Any) -> list[str]:
    words = None if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
    if words is None or not all(isinstance(word, str) for word in words):
        raise UserError(f"{where}: {value!r:.40} is no list of words. Give one, or a text with spaces between words")
    return words


def predicate_place(where: str, value: object, words: int) -> int:
    """Return the predicate's place. Raises UserError, naming the `where`, if there is no such word."""
    if isinstance(value, str | float) and re.fullmatch(r" *[0-9]+(\.0)? *", str(value)):  # of a table
        value = int(float(value))
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < words:
        raise UserError(f"{where}: predicate {value!r} is not the place of one of {words} words, 0 to {words - 1}")
    return value
