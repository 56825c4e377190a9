"""Tables of text: .csv (quoted as RFC 4180) and .tsv (no quoting), with the names of the columns in the first line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from leanbert.data.formats.fields import no_field, refuse_doubles
from leanbert.errors import UserError
from leanbert.messages import say_once

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
"""What separates the cells of a .csv file: the first with which its header has the fields that are wanted."""

CELL_CHARACTERS = 1 << 26
"""A longer cell is taken for a quote that is never closed: it would fill the memory."""

_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*"')

Lines = Iterable[tuple[int, str]]
Rows = Iterator[tuple[int, list[str]]]


def table_records(lines: Lines, name: str, kind: str, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file:line", cells by column) of a file whose `kind` is .csv or .tsv; blank lines are skipped.

    Raises UserError: a column of a `wanted` field is not in the header, or two have one name; a row has other cells
    than the header; a quote is not closed. Names file and line, of a row its first.
    """
    rows = _tab_rows(lines) if kind == ".tsv" else _quoted_rows(lines, name, wanted)
    header: list[str] = []
    for number, cells in rows:
        where = f"{name}:{number}"
        if not cells:
            continue
        if not header:
            header = cells
            refuse_doubles(where, [column for column in header if column])
            for field in wanted:
                if field not in header:
                    raise no_field(where, field, header)
        elif len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            fix = "Add the missing ones" if len(cells) < len(header) else "Quote a text that has a delimiter in it"
            raise UserError(f"{where}: {len(cells)} cells, the header has {len(header)}. {fix}")


def _tab_rows(lines: Lines) -> Rows:
    for number, line in lines:
        line = line.removesuffix("\n")
        yield number, line.split("\t") if line else []


def _quoted_rows(lines: Lines, name: str, wanted: Sequence[str]) -> Rows:
    """Yield (number of its first line, cells) of the rows of a .csv file; a quoted cell may hold line ends."""
    lines = iter(lines)
    header = next((line for line in lines if not line[1].isspace()), None)
    if header is None:
        return
    delimiter = _delimiter(header[1], wanted)
    if delimiter != ",":
        say_once(f"{name}: read with the {DELIMITERS[delimiter]} between cells, as its header has it")
    waiting: list[tuple[int, str]] = []

    def texts() -> Iterator[str]:
        for line in chain([header], lines):
            waiting.append(line)
            yield line[1]

    csv.field_size_limit(CELL_CHARACTERS)
    try:
        for cells in csv.reader(texts(), delimiter=delimiter, strict=True):
            yield waiting[0][0], cells
            waiting.clear()
    except csv.Error as error:
        raise UserError(
            f"{name}:{_open_quote(waiting, delimiter)}: a cell begins with a quote here that does not close it "
            f'({error}). Close it at the end of the cell, and write a quote inside of it as ""'
        ) from error


def _delimiter(header: str, wanted: Sequence[str]) -> str:
    for delimiter in DELIMITERS:
        if set(wanted) <= set(next(csv.reader([header], delimiter=delimiter))):
            return delimiter
    return ","


def _open_quote(lines: Sequence[tuple[int, str]], delimiter: str) -> int:
    """Return the number of the line in which the cell begins that cannot be read."""
    text, at = "".join(line for _, line in lines), 0
    cell_end = re.compile(f"[{re.escape(delimiter)}\n]")
    while at < len(text):
        quoted = _QUOTED.match(text, at)
        end = cell_end.match(text, quoted.end()) if quoted else None if text[at] == '"' else cell_end.search(text, at)
        if end is None:
            break
        at = end.end()
    return lines[0][0] + text.count("\n", 0, at)
