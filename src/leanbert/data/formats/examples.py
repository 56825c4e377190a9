"""Records of named fields out of files: the examples of the tasks that are trained on answers, and what to answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from leanbert.data.formats.columns import dataset_records
from leanbert.data.formats.corpora import Corpus, file_records, has_fields, no_report
from leanbert.data.formats.documents import Skipped
from leanbert.data.formats.fields import Record, text_of, value_of
from leanbert.data.formats.readers import open_binary, whole_lines
from leanbert.errors import UserError


def read_records(
    files: Sequence[str],
    setting: str,
    wanted: Sequence[str] = (),
    texts: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Iterator[tuple[str, Record]]:
    """Yield ("file:line", record) of files and data sets with fields, in the order of their paths.

    Cells of tables are texts; a field of JSON or of a column may be anything. A `wanted` field has something in it, and
    is found in the record by its whole name, `a.b` too. A record that is blank in one of its `texts` is left out, and
    counted in a line. Other fields may be missing.

    Raises:
        UserError: A pattern matches no file; a file has no such fields, or cannot be read. Names file and line.

    """
    skipped = Skipped()
    for place, record in Corpus(tuple(files), setting=setting).records((*texts, *wanted), optional):
        for field in wanted:
            record[field] = value_of(place, record, field)
            if record[field] is None:
                raise UserError(f'{place}: no field "{field}" but null. Set the name of the field, or fill it')
        if not skipped.lacks(place, *(text_of(place, record, field) for field in texts)):
            yield place, record
    skipped.tell()


def prediction_inputs(
    files: Sequence[str], wanted: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, str | Record]]:
    """Yield ("file:line", what to answer) as it comes: records of formats that have fields, lines of other files.

    "-" is standard input, which has lines. They come without line ends, and blank ones too.
    """
    for pattern in files:
        if pattern == "-":
            yield from _lines(sys.stdin.buffer, "standard input")
            continue
        corpus = Corpus((pattern,), setting="data.predict_files", suffixes=("",))
        for path in corpus.files:
            if has_fields(path):
                yield from file_records(path, wanted, optional)
                continue
            with open_binary(path, no_report) as stream:
                yield from _lines(stream, str(path))
        for spec in corpus.datasets:
            yield from dataset_records(spec, wanted, optional)


def prediction_texts(files: Sequence[str], fields: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts of all that is to be answered: those in the `fields`, or between the tabs of a line."""
    for place, found in prediction_inputs(files, fields):
        if isinstance(found, str):
            yield found.split("\t", len(fields) - 1) if len(fields) > 1 else [found]
        else:
            yield [text_of(place, found, field) for field in fields]


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[str, str]]:
    for number, line in whole_lines(stream, name):
        yield f"{name}:{number}", line.removesuffix("\n")
