"""Documents out of files, globs and data sets, streamed: memory does not grow with the corpus."""

from __future__ import annotations

import glob
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from leanbert.data.readers import (
    Report,
    open_binary,
    open_dataset,
    read_dataset,
    read_json_lines,
    read_lines,
    read_parquet,
    read_table,
    whole_lines,
)
from leanbert.data.storage import expand
from leanbert.errors import UserError

Separator = Literal["blank_line", "line"]

PIECE_CHARACTERS = 1 << 20
"""A longer document comes in pieces of about this size."""

SUFFIXES = (
    ".txt",
    ".txt.gz",
    ".conll",
    ".conll.gz",
    ".jsonl",
    ".jsonl.gz",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".parquet",
)


class EmptyCorpusError(UserError):
    """There is no document in the corpus, or in the part of it that was asked for."""


class Piece(NamedTuple):
    """A document or, of a long one, a part, with whether the document begins with it, and ends with it.

    Parts are cut before white space where there is any, so that tokens are the same as of the whole.
    """

    text: str
    begins: bool
    ends: bool


def no_report(_: int) -> None:
    """Report progress to nobody."""


@dataclass(frozen=True)
class Corpus:
    """Files and data sets, and how their text is cut into documents.

    `patterns` are paths, globs (`**` too) or `hf:NAME_OR_FOLDER[:SPLIT]`; `text_field` names the JSON field or
    table column; `separator` is what stands between documents of text files; `setting` is named in errors;
    `suffixes` are the formats that are taken.
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

    def pieces(self, report: Report = no_report) -> Iterator[Piece]:
        """Yield all documents in the order of the sorted paths, long ones in pieces; none is blank."""
        for path in self.files:
            yield from _with_begins(self._read(path, report))
        for spec in self.datasets:
            yield from _with_begins(_records(read_dataset(open_dataset(spec), spec, self.text_field)))

    def _match(self, pattern: str) -> list[Path]:
        literal = expand(pattern, self.setting)
        paths = [literal] if literal.exists() else [Path(p) for p in glob.glob(str(literal), recursive=True)]
        if literal.is_dir():
            raise UserError(f'{self.setting}: "{pattern}" is a folder. Write "{pattern}/**/*.txt"')
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise UserError(f'{self.setting}: no file matches "{pattern}". Check the path, from {Path.cwd()}')
        for path in paths:
            if not path.name.endswith(self.suffixes):
                raise UserError(f"{path}: unknown format. {self.setting} takes {' '.join(self.suffixes)}")
        return paths

    def _read(self, path: Path, report: Report) -> Iterator[tuple[str, bool]]:
        name = str(path)
        if path.suffix == ".parquet":
            yield from _records(read_parquet(path, self.text_field, report))
            return
        with open_binary(path, report) as stream:
            lines = read_lines(stream, name)
            kind = Path(name.removesuffix(".gz")).suffix
            if kind == ".jsonl":
                yield from _records(read_json_lines(lines, name, self.text_field))
            elif kind in (".csv", ".tsv"):
                yield from _records(read_table(lines, name, self.text_field))
            else:
                yield from split_documents((line for _, line in lines), self.separator)


@dataclass(frozen=True)
class Split:
    """The part of a corpus whose documents' hash, a number in [0, 1), lies in [low, high).

    The hash is that of the text (of a long document's first piece), so that the share held out for
    validation depends neither on order nor on file names.
    """

    corpus: Corpus
    low: float = 0.0
    high: float = 1.0

    def pieces(self, report: Report = no_report) -> Iterator[Piece]:
        """Yield the pieces of the documents that belong to this part."""
        chosen = False
        for piece in self.corpus.pieces(report):
            if piece.begins:
                chosen = self.low <= document_hash(piece.text) < self.high
            if chosen:
                yield piece

    @property
    def whole(self) -> bool:
        """Whether every document belongs to it."""
        return self.low <= 0 and self.high >= 1


def document_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text only."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_documents(lines: Iterable[str], separator: Separator) -> Iterator[tuple[str, bool]]:
    r"""Yield (text, ends) of the documents in `lines` (with their "\n"), long ones in several pieces."""
    parts: list[str] = []
    size, open_document, at_line_start = 0, False, True
    for line in lines:
        blank = at_line_start and line.isspace()
        at_line_start = line.endswith("\n")
        if not blank:
            parts.append(line)
            size += len(line)
        if size > PIECE_CHARACTERS:
            text = "".join(parts)
            cut = _border(text)
            yield text[:cut], False
            parts, size, open_document = [text[cut:]], len(text) - cut, True
        ends = blank if separator == "blank_line" else at_line_start
        if ends and (parts or open_document):
            yield "".join(parts).rstrip(), True
            parts, size, open_document = [], 0, False
    if parts or open_document:
        yield "".join(parts).rstrip(), True


def prediction_lines(files: Sequence[str]) -> Iterator[str]:
    """Yield the lines of text files (of any name), or of standard input for "-", without line ends, as they come."""
    for pattern in files:
        if pattern == "-":
            yield from _whole(sys.stdin.buffer, "standard input")
            continue
        for path in Corpus((pattern,), setting="data.predict_files", suffixes=("",)).files:
            with open_binary(path, no_report) as stream:
                yield from _whole(stream, str(path))


def _whole(stream: BinaryIO, name: str) -> Iterator[str]:
    return (line.rstrip("\n") for _, line in whole_lines(read_lines(stream, name)))


def _records(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    for text in texts:
        start = 0
        while len(text) - start > PIECE_CHARACTERS:
            cut = start + _border(text[start : start + PIECE_CHARACTERS])
            yield text[start:cut], False
            start = cut
        if start or not (text.isspace() or not text):
            yield text[start:], True


def _with_begins(parts: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    begins = True
    for text, ends in parts:
        yield Piece(text, begins, ends)
        begins = ends


def _border(text: str) -> int:
    """Return where to cut: before the last white space, or at the end if there is none (Chinese)."""
    space = max(text.rfind(" "), text.rfind("\n", 0, -1))
    return len(text[: max(space, 0)].rstrip()) or len(text)


def _is_dataset(pattern: str) -> bool:
    return pattern.startswith("hf:")
