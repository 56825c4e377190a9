"""Column files of the CoNLL shared tasks: a word a line, blank lines between sentences.

Columns are what stands between tabs in a line that has tabs, else between spaces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from leanbert.data.formats.readers import lines_of
from leanbert.errors import UserError
from leanbert.messages import say_once

Row = tuple[str, ...]
Line = tuple[int, str]

COLUMNS = (
    ".conll", "_conll", ".conllu", ".conllx", ".conll2003", ".bio", ".iob", ".iob2", ".train", ".testa", ".testb",
)  # fmt: skip
"""Endings of the names of column files, as the shared tasks and their followers have them."""

DOCSTART = "-DOCSTART-"
"""Begins a document of CoNLL-2003, in a line like that of a word."""

_BRACKETS = re.compile(r"(?:\(([^()*]+))?\*(\))?")
_DOCUMENT = re.compile(rf"#(begin|end) document\b|###MEDLINE:|{DOCSTART}([ \t]|$)")
_TAG = re.compile(r"O|[BIESLU]-\S+")
_NO_WORD = re.compile(r"[0-9]+[-.][0-9]+\t")
_COMMENT = re.compile(r"# +(new(doc|par)\b|id +[^ ]|[\w.:-]+ *=( |$)|https?://)|#\thttps?://")


def is_columns(name: str, endings: tuple[str, ...] = COLUMNS) -> bool:
    """Whether a file of this name, which may be compressed (.gz), has columns."""
    return name.removesuffix(".gz").endswith(endings)


def looks_tagged(name: str) -> bool:
    """Whether a file has a word and its tag in each line."""
    width = 0
    for _, line in lines_of(name):
        if line.isspace() or _DOCUMENT.match(line):
            continue
        cells = _cells(line.removesuffix("\n"))
        width = width or len(cells)
        if len(cells) < 2 or len(cells) != width or _TAG.fullmatch(cells[-1]) is None:
            return False
    return width > 0


def read_sentences(files: Sequence[str]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield ("file:line" of its first word, columns by word) of each sentence.

    `#begin document`, `#end document`, `-DOCSTART-` and `###MEDLINE:` stand between sentences, comments
    (`# key = value`) at their beginning; other lines that begin with # are words. CoNLL-U's multi-word tokens (1-2) and
    empty nodes (2.1) are left out and counted. Raises UserError: a line has more or fewer columns than the sentence.
    Names file and line.
    """
    for name in files:
        lines: list[Line] = []
        universal, without = is_columns(name, (".conllu",)), 0
        for number, line in lines_of(name):
            if universal and _NO_WORD.match(line):
                without += 1
            elif line.isspace() or _DOCUMENT.match(line):
                yield from _sentence(name, lines)
                lines = []
            else:
                lines.append((number, line.removesuffix("\n")))
        yield from _sentence(name, lines)
        if without:
            say_once(f"{name}: {without:,} multi-word tokens and empty nodes left out: their words stand beside")


def _sentence(name: str, lines: list[Line]) -> Iterator[tuple[str, list[list[str]]]]:
    tabs = any("\t" in text for _, text in lines if not _COMMENT.match(text))
    words = [text[0] != "#" or not (_COMMENT.match(text) or (tabs and "\t" not in text)) for _, text in lines]
    lines = lines[words.index(True) :] if True in words else []
    rows = [_cells(text) for _, text in lines]
    for (number, _), row in zip(lines, rows, strict=True):
        if len(row) != len(rows[0]):
            comment = ", or write the comment before it as # key = value" if lines[0][1][0] == "#" else ""
            raise UserError(f"{name}:{number}: {len(row)} columns after {len(rows[0])}. Mend the line{comment}")
    if rows:
        yield f"{name}:{lines[0][0]}", rows


def _cells(line: str) -> list[str]:
    if "\t" in line:
        return [cell.strip(" ") for cell in line.split("\t")]
    return [cell for cell in line.split(" ") if cell]


def read_columns(files: Sequence[str], wanted: Sequence[int]) -> Iterator[tuple[str, list[Row]]]:
    """Yield ("file:line", wanted columns by word) of each sentence.

    Raises UserError: there is no such column, or nothing in it. Names file and line.
    """
    for where, rows in read_sentences(files):
        try:
            found = [tuple(row[column] for column in wanted) for row in rows]
        except IndexError:
            raise UserError(
                f"{where}: {len(rows[0])} columns, none with number {max(wanted, key=abs)}. Set data.word_column"
            ) from None
        for number, row in enumerate(found, start=1):
            if "" in row:
                raise UserError(f"{where}: word {number} of the sentence, or its tag, is empty. Mend its line")
        yield where, found


def read_roles(files: Sequence[str], word: int, first: int, last: bool) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield ("file:line", words, BIO tags) for each column of roles, which has one predicate's arguments in brackets.

    Args:
        files: Column files.
        word: Column of the words, from 0.
        first: First column of roles.
        last: Whether the last column is one of them.

    """
    without = 0
    for where, rows in read_sentences(files):
        if len(rows[0]) <= max(word, first - 1):
            raise UserError(f"{where}: {len(rows[0])} columns. Set data.word_column and data.role_columns")
        columns = range(first, len(rows[0]) - (not last))
        without += not columns
        for column in columns:
            yield where, [row[word] for row in rows], bio_of_brackets(where, [row[column] for row in rows])
    if without:
        say_once(f"data.role_columns: {without:,} sentences have no predicate, and are left out")


def bio_of_brackets(where: str, cells: Sequence[str]) -> list[str]:
    """Return the BIO tags of a column such as `(A0*`, `*`, `*)`, `(V*)`.

    Raises UserError: a cell is not of this form, or a bracket is not closed.
    """
    labels, role = [], None
    for number, cell in enumerate(cells):
        match = _BRACKETS.fullmatch(cell)
        if match is None or (match[1] and role) or (match[2] and not (match[1] or role)):
            raise UserError(f"{where}: cell {cell!r} of word {number + 1} is no bracket, as (A0*, * or *). Mend it")
        opened = match[1]
        role = opened or role
        labels.append("O" if role is None else f"{'B' if opened else 'I'}-{role}")
        role = None if match[2] else role
    if role is not None:
        raise UserError(f"{where}: ({role}* is not closed. Add the bracket")
    return labels
