"""Documents and records out of files, globs and data sets, streamed: memory does not grow with the corpus."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from leanbert.data.formats.columns import dataset_records, parquet_records
from leanbert.data.formats.documents import (
    Piece,
    Separator,
    Skipped,
    document_hash,
    in_pieces,
    split_documents,
    with_begins,
)
from leanbert.data.formats.fields import Record, text_of
from leanbert.data.formats.readers import Report, json_object, kind_of, lines_of, no_report, open_binary, read_lines
from leanbert.data.formats.tables import table_records
from leanbert.errors import UserError
from leanbert.messages import say_once

FIELDS = (".jsonl", ".csv", ".tsv", ".parquet")
"""Endings of files that hold records of named fields; text files may be compressed (.gz)."""

SUFFIXES = (
    *(f"{ending}{packed}" for ending in (".txt", ".conll", ".jsonl", ".csv", ".tsv") for packed in ("", ".gz")),
    ".parquet",
)

READERS: dict[str, Callable[[str, Report], Iterator[tuple[str, Record]]]] = {}
"""Formats of a user's own, with records of named fields: what yields ("file:line", record), by the file's ending."""


@dataclass(frozen=True)
class Corpus:
    """Files and data sets, and how their text is cut into documents.

    `patterns` are paths, globs (`**` too) or `hf:` names of data sets; `text_field` names the field of records;
    `separator` is what stands between documents of text files; `setting` is named in errors; `suffixes` are the
    formats that are taken.
    """

    patterns: tuple[str, ...]
    text_field: str = "text"
    separator: Separator = "blank_line"
    setting: str = "data.train_files"
    suffixes: tuple[str, ...] = SUFFIXES

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that match, sorted. Raises `UserError` if a pattern matches none, or an unknown format."""
        found = {path for pattern in self.patterns if not _is_dataset(pattern) for path in self._match(pattern)}
        return tuple(sorted(found, key=str))

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """The `hf:` patterns, as given."""
        return tuple(filter(_is_dataset, self.patterns))

    @property
    def names(self) -> list[str]:
        """The files and the data sets, in the order in which they are read."""
        return [*map(str, self.files), *self.datasets]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files on disk, compressed where they are."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self, low: float = 0.0, high: float = 1.0, report: Report = no_report) -> Iterator[Piece]:
        """Yield the documents in the order of the sorted paths, long ones in pieces; none is blank.

        Only those whose hash, a number in [0, 1) that depends on their text alone, lies in [low, high).
        """
        chosen = False
        skipped = Skipped()
        for name in self.names:
            for piece in with_begins(self._parts(name, skipped, report)):
                if piece.begins:
                    chosen = low <= document_hash(piece.text) < high
                if chosen:
                    yield piece
        skipped.tell()

    def _parts(self, name: str, skipped: Skipped, report: Report) -> Iterator[tuple[str, bool]]:
        if has_fields(name):
            for where, record in records_of(name, (self.text_field,), report=report):
                text = text_of(where, record, self.text_field)
                if not skipped.lacks(where, text):
                    yield from in_pieces(text)
            return
        with open_binary(Path(name), report) as stream:
            yield from split_documents((line for _, line in read_lines(stream, name)), self.separator)

    def _match(self, pattern: str) -> list[Path]:
        if os.path.isdir(os.path.expanduser(pattern)):
            raise UserError(f'{self.setting}: "{pattern}" is a folder. Write "{pattern}/**/*.txt"')
        paths = [Path(name) for name in _glob(pattern) if not os.path.isdir(name)]
        if not paths:
            raise UserError(f'{self.setting}: no file matches "{pattern}". Check the path, from {Path.cwd()}')
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no file, or a link to none. Correct it, or leave it out of {self.setting}")
            if kind_of(path.name) not in READERS and not path.name.lower().endswith(self.suffixes):
                raise UserError(f"{path}: unknown format. {self.setting} takes {' '.join(self.suffixes)}")
        return paths


def expanded(patterns: Sequence[str], setting: str) -> list[str]:
    """Return the files and data sets that match, whatever their format, pattern by pattern."""
    return [name for one in patterns for name in Corpus((one,), setting=setting, suffixes=("",)).names]


def has_fields(name: str) -> bool:
    """Return whether a file or data set holds records of named fields, not text."""
    return _is_dataset(name) or kind_of(name) in FIELDS or kind_of(name) in READERS


def records_of(
    name: str, wanted: Sequence[str], optional: Sequence[str] = (), report: Report = no_report
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) of a file or data set with fields; of columns those `wanted` or `optional`."""
    kind = kind_of(name)
    if _is_dataset(name):
        yield from dataset_records(name, wanted, optional)
    elif kind in READERS:
        yield from READERS[kind](name, report)
    elif kind == ".parquet":
        yield from parquet_records(Path(name), wanted, optional, report)
    elif kind == ".jsonl":
        for number, line in lines_of(name, report):
            if not line.isspace():
                yield f"{name}:{number}", json_object(f"{name}:{number}", line.removesuffix("\n"))
    else:
        yield from table_records(lines_of(name, report), name, kind, wanted)


def as_list(files: str | list[str] | None) -> list[str] | None:
    """Return one file as a list of files."""
    return [files] if isinstance(files, str) else files


def besides(patterns: Sequence[str], setting: str, others: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the patterns of training files without the files of evaluation, of `others` by setting, among them.

    A file that is named itself, not found by a glob, stays: it is meant to be learned by heart. Both are said. Raises
    UserError: there is no other file.
    """
    owners: dict[object, str] = {}
    for other, some in others.items():
        for pattern in some:
            owners |= dict.fromkeys([pattern, *map(_identity, filter(os.path.isfile, _glob(pattern)))], other)
    kept: list[str] = []
    left_out = False
    for pattern in patterns:
        for name in expanded([pattern], setting):
            owner = owners.get(name if _is_dataset(name) else _identity(name))
            named = name in (pattern, str(Path(os.path.expanduser(pattern))))
            if owner is not None:
                fate = "trained on all the same" if named else "left out of training"
                say_once(f"{setting}: {name} is in {owner} too, and is {fate}")
            if owner is None or named:
                kept.append(name)
            else:
                left_out = True
    if not kept:
        raise UserError(f"{setting}: all that matches is in {' and '.join(others)} too. Give other files to train on")
    return kept if left_out else list(patterns)


def _glob(pattern: str) -> list[str]:
    literal = os.path.expanduser(pattern)  # a file may be called ~x
    return [literal] if os.path.exists(literal) else glob.glob(literal, recursive=True)


def _identity(name: str) -> tuple[int, int]:
    status = os.stat(name)
    return status.st_dev, status.st_ino


def held_out_border(corpus: Corpus, fraction: float) -> float:
    """Return the hash below which documents are held out: the `fraction`, or just above the lowest if none is below.

    The text (of a long document the first piece) is hashed, so that what is held out depends neither on order
    nor on file names, and equal texts are on one side. Raises UserError: there is no document, or none is left to train
    on.
    """
    lowest, highest = 1.0, -1.0
    for piece in corpus.pieces():
        if piece.begins:
            number = document_hash(piece.text)
            lowest, highest = min(lowest, number), max(highest, number)
            if lowest < fraction <= highest:
                return fraction
    if highest < 0:
        raise UserError(f"{corpus.setting}: the corpus is empty. Give files with text")
    border = fraction if lowest < fraction else lowest + 2.0**-48
    if highest < border:
        raise UserError(f"data.val_share: {fraction} leaves no document to train on. Give data.val_files")
    return border


def _is_dataset(name: str) -> bool:
    return name.startswith("hf:")
