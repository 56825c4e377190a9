"""One reader per file format: each yields texts and says file and line of what it cannot read."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from leanbert.errors import UserError

Report = Callable[[int], object]
"""Is told how many bytes were read from disk since the last call."""

PART_BYTES = 1 << 20
"""A longer line of a text file is read in parts of this size, so that one endless line needs no memory."""


class _CountedFile(io.FileIO):
    """A file that reports what is read from it; below gzip it counts compressed bytes, as `stat` does."""

    def __init__(self, path: Path, report: Report) -> None:
        super().__init__(path)
        self._report = report

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = super().readinto(buffer) or 0
        self._report(count)
        return count


def open_binary(path: Path, report: Report) -> BinaryIO:
    """Open a plain or gzip-compressed file for reading. Raises `UserError` if it cannot be opened."""
    try:
        plain = io.BufferedReader(_CountedFile(path, report), buffer_size=1 << 18)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights") from error
    return cast(BinaryIO, gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain)


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    r"""Yield (line number, text) with line ends as "\n"; a line above `PART_BYTES` comes in several parts.

    Raises `UserError` that names the line for text that is not UTF-8 and for a compressed file cut short.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    try:
        while chunk := stream.readline(PART_BYTES):
            if chunk.endswith(b"\r"):
                chunk += stream.readline(1)  # its line feed, if a part ends between the two
            complete = chunk.endswith(b"\n")
            text = decoder.decode(chunk, final=complete)
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text[:-2] + "\n" if text.endswith("\r\n") else text
            number += complete
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}:{number}: not valid UTF-8 ({error.reason}). Convert the file, e.g. with iconv -t UTF-8"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{name}:{number}: the compressed file is cut short or damaged ({error}). Copy or download it again"
        ) from error


def read_json_lines(lines: Iterable[tuple[int, str]], name: str, field: str) -> Iterator[str]:
    """Yield the string `field` of each JSON object, one a line; blank lines are skipped."""
    for place, record in json_records(lines, name):
        text = record.get(field)
        if not isinstance(text, str):
            raise _no_field(place, field)
        yield whole_characters(text)


def json_records(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file:line", object) of JSON objects, one a line; blank lines are skipped."""
    for number, line in whole_lines(lines):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}:{number}: not valid JSON ({error}). Write one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{name}:{number}: not a JSON object. Write one object a line")
        yield f"{name}:{number}", record


def whole_characters(text: str) -> str:
    """Return the text without lone surrogates, which JSON can spell: the tokenizer would refuse them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_table(lines: Iterable[tuple[int, str]], name: str, field: str) -> Iterator[str]:
    """Yield column `field` of a .csv (quoted as RFC 4180) or .tsv (no quoting) file with a header line."""
    for place, record in table_records(lines, name, (field,)):
        if field not in record:
            raise _no_field(place, field)
        yield record[field]


def table_records(
    lines: Iterable[tuple[int, str]], name: str, wanted: Iterable[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("file:line", cells by column) of a .csv (quoted as RFC 4180) or .tsv (no quoting) with a header line.

    Raises UserError if a `wanted` column is not in the header.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    texts = (line for _, line in whole_lines(lines))
    is_tsv = name.removesuffix(".gz").endswith(".tsv")
    rows = csv.reader(texts, delimiter="\t" if is_tsv else ",", quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL)
    try:
        header = next(rows, [])
        for field in wanted:
            if field not in header:
                raise _no_field(f"{name}:1", field)
        for row in rows:
            if row:
                yield f"{name}:{rows.line_num}", dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise UserError(f"{name}:{rows.line_num}: not a valid table ({error}). Mend the row") from error


def read_parquet(path: Path, field: str, report: Report) -> Iterator[str]:
    """Yield column `field` of a .parquet file, some rows at a time. Raises `UserError` without pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f'{path}: .parquet needs pyarrow. Run: pip install "leanbert[parquet]"') from error
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(str(path), field)
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                yield from _strings(batch.column(0).to_pylist(), str(path), field)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)}). Copy it again") from error
    report(path.stat().st_size)


def open_dataset(spec: str) -> object:
    """Return the `datasets.Dataset` that `hf:NAME_OR_FOLDER[:SPLIT]` names (split `train` if none is given).

    A folder may hold data files or what `Dataset.save_to_disk` wrote. Raises `UserError` without `datasets`,
    and for what it cannot load.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'{spec}: needs datasets. Run: pip install "leanbert[hf]"') from error
    name, split = split_dataset_spec(spec)
    try:
        if (Path(name) / "state.json").exists():
            return datasets.load_from_disk(name)
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[split]
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        raise UserError(
            f"{spec}: cannot be loaded ({type(error).__name__}: {_first_line(error)}). Write hf:NAME_OR_FOLDER[:SPLIT]"
        ) from error


def read_dataset(dataset: object, spec: str, field: str) -> Iterator[str]:
    """Yield column `field` of a Hugging Face dataset, row by row from its memory-mapped files."""
    if field not in dataset.column_names:  # type: ignore[attr-defined]
        raise _no_field(spec, field)
    for batch in dataset.select_columns([field]).iter(batch_size=1024):  # type: ignore[attr-defined]
        yield from _strings(batch[field], spec, field)


def split_dataset_spec(spec: str) -> tuple[str, str]:
    """Cut `hf:NAME[:SPLIT]` into name and split."""
    name = spec.removeprefix("hf:")
    if ":" in name and not Path(name).exists():
        name, _, split = name.rpartition(":")
        return name, split
    return name, "train"


def whole_lines(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join the parts of long lines that `read_lines` yields."""
    parts: list[str] = []
    number = 0
    for number, part in lines:
        parts.append(part)
        if part.endswith("\n"):
            yield number, "".join(parts)
            parts.clear()
    if parts:
        yield number, "".join(parts)


def _strings(values: Iterable[object], name: str, field: str) -> Iterator[str]:
    for value in values:
        if not isinstance(value, str):
            raise UserError(f'{name}: column "{field}" holds {type(value).__name__}, not text. Set data.text_field')
        yield value


def _no_field(place: str, field: str) -> UserError:
    return UserError(f'{place}: no text in field "{field}". Set data.text_field to the field that holds the text')


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
