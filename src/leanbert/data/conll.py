"""Column files of the CoNLL shared tasks: a word a line, blank lines between sentences, columns between white space."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from leanbert.data.readers import open_binary, read_lines, whole_lines
from leanbert.data.sources import Corpus, no_report
from leanbert.errors import UserError

Row = tuple[str, ...]

_BRACKETS = re.compile(r"(?:\(([^()*]+))?\*(\))?")


def read_sentences(files: Sequence[str]) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield ("file:line" of its first word, columns by word) of each sentence; lines that begin with # are comments."""
    for path in Corpus(tuple(files), setting="data.train_files").files if files else ():
        with open_binary(path, no_report) as stream:
            rows: list[list[str]] = []
            number = 0
            for number, line in whole_lines(read_lines(stream, str(path))):
                if line.startswith("#"):
                    continue
                if line.strip():
                    rows.append(line.split())
                    if len(rows[-1]) != len(rows[0]):
                        raise UserError(f"{path}:{number}: {len(rows[-1])} columns after {len(rows[0])}. Mend the line")
                elif rows:
                    yield f"{path}:{number - len(rows)}", rows
                    rows = []
            if rows:
                yield f"{path}:{number - len(rows) + 1}", rows


def read_columns(files: Sequence[str], wanted: Sequence[int]) -> Iterator[tuple[str, list[Row]]]:
    """Yield ("file:line", wanted columns by word) of each sentence.

    Raises:
        UserError: There is no such column. Names file and line.
    """
    for place, rows in read_sentences(files):
        try:
            yield place, [tuple(row[column] for column in wanted) for row in rows]
        except IndexError:
            raise UserError(
                f"{place}: {len(rows[0])} columns, none with number {max(wanted, key=abs)}. Set data.word_column"
            ) from None


def read_roles(files: Sequence[str], word: int, first: int, last: bool) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield ("file:line", words, BIO tags) for each column of roles, which has one predicate's arguments in brackets.

    Args:
        files: Column files.
        word: Column of the words, from 0.
        first: First column of roles.
        last: Whether the last column is one of them.

    """
    for place, rows in read_sentences(files):
        if len(rows[0]) <= max(word, first - 1):
            raise UserError(f"{place}: {len(rows[0])} columns. Set data.word_column and data.role_columns")
        for column in range(first, len(rows[0]) - (not last)):
            yield place, [row[word] for row in rows], bio_of_brackets(place, [row[column] for row in rows])


def bio_of_brackets(place: str, cells: Sequence[str]) -> list[str]:
    """Return the BIO tags of a column such as `(A0*`, `*`, `*)`, `(V*)`.

    Raises:
        UserError: A cell is not of this form, or a bracket is not closed.
    """
    labels, role = [], None
    for number, cell in enumerate(cells):
        match = _BRACKETS.fullmatch(cell)
        if match is None or (match[1] and role) or (match[2] and not (match[1] or role)):
            raise UserError(f"{place}: cell {cell!r} of word {number + 1} is no bracket, as (A0*, * or *). Mend it")
        opened = match[1]
        role = opened or role
        labels.append("O" if role is None else f"{'B' if opened else 'I'}-{role}")
        role = None if match[2] else role
    if role is not None:
        raise UserError(f"{place}: ({role}* is not closed. Add the bracket")
    return labels
