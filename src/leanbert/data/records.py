"""Records of named fields out of files: the examples of the tasks that are trained on answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from leanbert.data.readers import json_records, open_binary, read_lines, table_records, whole_characters
from leanbert.data.sources import Corpus, no_report
from leanbert.errors import UserError

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".csv", ".tsv")
"""Formats that have fields; each may be compressed (.gz)."""


def read_records(files: Sequence[str], setting: str, wanted: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) of .jsonl, .csv and .tsv files, which may be compressed, in the order of their paths.

    Cells of tables are texts; a JSON field may be anything. Fields beyond those `wanted` may be missing.

    Raises:
        UserError: A pattern matches no file; a file has no such fields, or cannot be read. Names file and line.

    """
    for path in Corpus(tuple(files), setting=setting).files:
        name = str(path)
        kind = Path(name.removesuffix(".gz")).suffix
        if kind not in SUFFIXES:
            raise UserError(f"{path}: has no fields. {setting} takes {' '.join(SUFFIXES)}, each also with .gz")
        with open_binary(path, no_report) as stream:
            lines = read_lines(stream, name)
            records = json_records(lines, name) if kind == ".jsonl" else table_records(lines, name, wanted)
            for place, record in records:
                for field in wanted:
                    if record.get(field) is None:
                        raise UserError(f'{place}: no field "{field}". Set the name of the field, or add it')
                yield place, record


def text_of(place: str, record: Record, field: str) -> str:
    """Return the text in a field. Raises UserError, naming the `place`, if there is none."""
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f'{place}: no text in field "{field}". Set the name of the field that holds it')
    return whole_characters(value)


def items_of(place: str, record: Record, field: str, kind: type) -> list[Any]:
    """Return the list in a field, of which each item is of a `kind`. Raises UserError, naming the `place`, if not."""
    value = record.get(field)
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f'{place}: field "{field}" is no list of {kind.__name__}. Set the name of the field that is')
    return [whole_characters(item) for item in value] if kind is str else value
