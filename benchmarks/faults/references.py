"""Readers of each format that know nothing of LeanBERT's: what is in a file, or that it cannot be read for certain."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = tuple[str, ...]


class UnreadableError(Exception):
    """A file does not say for certain what is in it."""


def read(path: Path, fields: tuple[str, ...], lone_return: str = "\n") -> list[Record]:
    """Return the records of a file: the wanted fields, as texts with single spaces.

    A carriage return without a line feed is `lone_return`: a line's end, or white space.

    Raises:
        UnreadableError: Why it cannot be read.
    """
    if path.suffix == ".parquet":
        return _parquet(path, fields)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except Exception as error:
        raise UnreadableError(str(error)) from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    kind = Path(path.name.removesuffix(".gz")).suffix
    text = text.replace("\r", lone_return)
    if kind in (".csv", ".tsv"):
        return _table(text, kind, fields)
    if kind == ".jsonl":
        return _objects(text, fields)
    if kind == ".conll":
        return plain(_sentences(text))
    if kind == ".txt":
        return plain((block,) for block in _blocks(text))
    return plain((line,) for line in text.removesuffix("\n").split("\n"))


def plain(records: Iterable[Iterable[Any]]) -> list[Record]:
    return [tuple(" ".join(_text(value).split()) for value in record) for record in records]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text.encode("utf-8", "replace").decode()


def _blocks(text: str) -> list[str]:
    blocks, block = [], []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            block.append(line)
        elif block:
            blocks.append("\n".join(block))
            block = []
    return blocks


def _objects(text: str, fields: tuple[str, ...]) -> list[Record]:
    found = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found.append([_typed(record[field]) for field in fields])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UnreadableError(str(error)) from error
    return plain(found)


def _typed(value: Any) -> Any:
    if value is None:
        raise UnreadableError("null")
    return value


def _table(text: str, kind: str, fields: tuple[str, ...]) -> list[Record]:
    tabs = kind == ".tsv"
    csv.field_size_limit(2**31 - 1)
    quoting: Any = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    try:
        rows = [
            row
            for row in csv.reader(
                io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=quoting, strict=True
            )
            if row
        ]
    except csv.Error as error:
        raise UnreadableError(str(error)) from error
    header = rows[0] if rows else []
    if len(set(header)) != len(header) or not set(fields) <= set(header):
        raise UnreadableError("header")
    if any(len(row) != len(header) for row in rows):
        raise UnreadableError("rows of another length than the header")
    return plain([row[header.index(field)] for field in fields] for row in rows[1:])


def _sentences(text: str) -> list[tuple[list[str], list[str]]]:
    found = []
    for block in _blocks(text):
        lines = [line.split("\t") if "\t" in line else line.split() for line in block.split("\n")]
        if lines[0][0] == "-DOCSTART-":
            lines = lines[1:]
        width = len(lines[-1]) if lines else 0
        lines = [cells for cells in lines if len(cells) == width or not cells[0].startswith("#")]
        if any(len(cells) != width for cells in lines) or width == 1:
            raise UnreadableError("columns")
        if any(not cells[0].strip() for cells in lines):
            raise UnreadableError("no word")
        if lines:
            found.append(([cells[0] for cells in lines], [cells[-1] for cells in lines]))
    return found


def _parquet(path: Path, fields: tuple[str, ...]) -> list[Record]:
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
        return plain([_typed(row[field]) for field in fields] for row in rows)
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError(str(error)) from error
