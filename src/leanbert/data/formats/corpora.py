"""Documents out of files, globs and data sets, streamed: memory does not grow with the corpus."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from leanbert.data.formats.readers import Report, json_records, kind_of, open_binary, read_lines, whole_lines
from leanbert.data.formats.tables import table_records
from leanbert.errors import UserError
from leanbert.messages import say_once

FIELDS = (".jsonl", ".csv", ".tsv", ".parquet")
"""Endings of files that hold records of named fields; those of text may be compressed (.gz)."""

SUFFIXES = (
    *(f"{ending}{packed}" for ending in (".txt", ".conll", ".jsonl", ".csv", ".tsv") for packed in ("", ".gz")),
    ".parquet",
)

READERS: dict[str, Callable[[Path, Report], Iterator[tuple[str, Record]]]] = {}
"""Formats of a user's own, with records of named fields: what yields ("file:line", record), by the file's ending."""


def no_report(_: int) -> None:
    """Report progress to nobody."""


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
        return tuple(pattern for pattern in self.patterns if _is_dataset(pattern))

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files on disk, compressed where they are."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self, low: float = 0.0, high: float = 1.0, report: Report = no_report) -> Iterator[Piece]:
        """Yield the documents in the order of the sorted paths, long ones in pieces; none is blank.

        Only those whose hash, a number in [0, 1) that depends on their text alone, lies in [low, high).
        """
        chosen = False
        for piece in self._all_pieces(report):
            if piece.begins:
                chosen = low <= document_hash(piece.text) < high
            if chosen:
                yield piece

    def _all_pieces(self, report: Report) -> Iterator[Piece]:
        skipped = Skipped()
        for path in self.files:
            if has_fields(path):
                records = file_records(path, (self.text_field,), report=report)
                yield from with_begins(self._texts(records, skipped))
                continue
            with open_binary(path, report) as stream:
                lines = (line for _, line in read_lines(stream, str(path)))
                yield from with_begins(split_documents(lines, self.separator))
        for spec in self.datasets:
            yield from with_begins(self._texts(dataset_records(spec, (self.text_field,)), skipped))
        skipped.tell()

    def records(self, wanted: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
        """Yield ("file:line", record) of all files and data sets, in the same order.

        Raises:
            UserError: A file is of a format without fields, lacks those `wanted`, or cannot be read. Names file and
                line.

        """
        for path in self.files:
            if not has_fields(path):
                raise UserError(
                    f"{path}: has no fields. {self.setting} takes .jsonl .csv .tsv, each also with .gz, .parquet "
                    "and hf: names"
                )
            yield from file_records(path, wanted, optional)
        for spec in self.datasets:
            yield from dataset_records(spec, wanted, optional)

    def _match(self, pattern: str) -> list[Path]:
        if os.path.isdir(os.path.expanduser(pattern)):
            raise UserError(f'{self.setting}: "{pattern}" is a folder. Write "{pattern}/**/*.txt"')
        paths = [Path(name) for name in _names(pattern) if not os.path.isdir(name)]
        if not paths:
            raise UserError(f'{self.setting}: no file matches "{pattern}". Check the path, from {Path.cwd()}')
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: no file, or a link to none. Correct it, or leave it out of {self.setting}")
            if kind_of(path) not in READERS and not path.name.lower().endswith(self.suffixes):
                raise UserError(f"{path}: unknown format. {self.setting} takes {' '.join(self.suffixes)}")
        return paths

    def _texts(self, records: Iterable[tuple[str, Record]], skipped: Skipped) -> Iterator[tuple[str, bool]]:
        for place, record in records:
            text = text_of(place, record, self.text_field)
            if not skipped.lacks(place, text):
                yield from in_pieces(text)


def has_fields(path: Path) -> bool:
    """Whether a file of this name holds records of named fields."""
    return kind_of(path) in FIELDS or kind_of(path) in READERS


def file_records(
    path: Path, wanted: Sequence[str], optional: Sequence[str] = (), report: Report = no_report
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) of a file with fields; of columns those that are `wanted` or `optional`."""
    name = str(path)
    kind = kind_of(path)
    if kind in READERS:
        yield from READERS[kind](path, report)
        return
    if kind == ".parquet":
        yield from parquet_records(path, wanted, optional, report)
        return
    with open_binary(path, report) as stream:
        lines = whole_lines(stream, name)
        yield from json_records(lines, name) if kind == ".jsonl" else table_records(lines, name, kind, wanted)


def as_list(files: str | list[str] | None) -> list[str] | None:
    """Return one file as a list of files."""
    return [files] if isinstance(files, str) else files


def besides(patterns: Sequence[str], setting: str, others: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the patterns of training files without the files of evaluation, of `others` by setting, among them.

    A file that is named itself, not found by a glob, stays: it is meant to be learned by heart. Both are said.

    Raises:
        UserError: There is no other file.

    """
    owners: dict[Any, str] = {}
    for other, some in others.items():
        for pattern in some:
            paths = [Path(name) for name in _names(pattern) if os.path.isfile(name)]
            owners |= dict.fromkeys([pattern, *map(_identity, paths)], other)
    kept: list[str] = []
    found = 0
    for pattern in patterns:
        corpus = Corpus((pattern,), setting=setting, suffixes=("",))
        for item in (*corpus.files, *corpus.datasets):
            owner = owners.get(_identity(item) if isinstance(item, Path) else item)
            named = str(item) in (pattern, str(Path(os.path.expanduser(pattern))))
            if owner is not None:
                fate = "trained on all the same" if named else "left out of training"
                say_once(f"{setting}: {item} is in {owner} too, and is {fate}")
            found += 1
            if owner is None or named:
                kept.append(str(item))
    if not kept:
        raise UserError(f"{setting}: all that matches is in {' and '.join(others)} too. Give other files to train on")
    return kept if len(kept) < found else list(patterns)


def _names(pattern: str) -> list[str]:
    literal = os.path.expanduser(pattern)  # a file may be called ~x
    return [literal] if os.path.exists(literal) else glob.glob(literal, recursive=True)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def held_out_border(corpus: Corpus, fraction: float) -> float:
    """Return the hash below which documents are held out: the `fraction`, or just above the lowest if none is below.

    The hash is that of the text (of a long document's first piece), so that what is held out depends neither on order
    nor on file names, and equal texts are on one side.

    Raises:
        UserError: There is no document, or none is left to train on.

    """
    lowest, highest = 1.0, -1.0
    for piece in corpus.pieces():
        if piece.begins:
            place = document_hash(piece.text)
            lowest, highest = min(lowest, place), max(highest, place)
            if lowest < fraction <= highest:
                return fraction
    if highest < 0:
        raise UserError(f"{corpus.setting}: the corpus is empty. Give files with text")
    border = fraction if lowest < fraction else lowest + 2.0**-48
    if highest < border:
        raise UserError(f"data.val_share: {fraction} leaves no document to train on. Give data.val_files")
    return border


def _is_dataset(pattern: str) -> bool:
    return pattern.startswith("hf:")
