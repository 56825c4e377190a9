"""Files as bytes to lines of text and records: says file and line of what it cannot read."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from leanbert.data.formats.fields import Record
from leanbert.errors import UserError

Report = Callable[[int], object]
"""Is told how many bytes were read from disk since the last call."""

PART_BYTES = 1 << 20
"""A longer line of a text file is read in parts of this size, so that one endless line needs no memory."""

LINE_CHARACTERS = 1 << 27
"""No record is longer than this: what is would fill the memory, such as an array of all records in one line."""

FOREIGN = {
    b"version https://git-lfs.github.com/spec/": "a pointer of Git LFS, not the file itself. Run: git lfs pull",
    codecs.BOM_UTF16_LE: "UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed with gzip. Give it a name that ends in .gz",
    **{b"BZh%d1AY&SY" % level: "compressed with bzip2. Unpack it, or use gzip" for level in range(1, 10)},
    b"\xfd7zXZ\0": "compressed with xz. Unpack it, or use gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd. Unpack it, or use gzip",
    b"PK\x03\x04": "a zip archive or a workbook, not text. Unpack it, or save it as .csv",
    b"PAR1": "in parquet format. Give it a name that ends in .parquet",
}
"""How files begin that are no text, and what they are."""


def no_report(_: int) -> None:
    """Report progress to nobody."""


class _CountedFile(io.FileIO):
    """A file that reports what is read from it; below gzip it counts compressed bytes, as `stat` does."""

    def __init__(self, path: Path, report: Report) -> None:
        super().__init__(path)
        self._report = report

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = super().readinto(buffer) or 0
        self._report(count)
        return count


def open_binary(path: Path, report: Report = no_report) -> BinaryIO:
    """Open a plain or gzip-compressed file for reading. Raises `UserError` if it cannot be opened, or is not gzip."""
    try:
        plain = io.BufferedReader(_CountedFile(path, report), buffer_size=1 << 18)
        head = plain.peek()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights") from error
    if not path.name.lower().endswith(".gz"):
        return plain
    if not head.startswith(b"\x1f\x8b"):
        plain.close()
        raise UserError(f"{path}: {what_it_is(head) or 'not compressed with gzip. Give it a name without .gz'}")
    return cast(BinaryIO, gzip.GzipFile(fileobj=plain))


def kind_of(name: str) -> str:
    """Return the ending of a file's name that says its format, such as ".csv", without that of compression."""
    return Path(name.lower().removesuffix(".gz")).suffix


def what_it_is(head: bytes) -> str | None:
    """Return what begins like this, if it is known to be no text, and what to do."""
    return next((f"is {what}" for magic, what in FOREIGN.items() if head.startswith(magic)), None)


def read_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    r"""Yield (line number, text); the ends "\n", "\r\n" and "\r" alike as "\n".

    A line above `PART_BYTES` comes in several parts. Raises `UserError` that names the line for what is no UTF-8 text
    and for a compressed file cut short.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    number = 1
    try:
        for line in _byte_lines(stream, name):
            if b"\0" in line:
                raise UserError(
                    f"{name}:{number}: holds a NUL byte, which no text does but UTF-16. Convert it with iconv"
                )
            complete = line.endswith(b"\n")
            yield number, decoder.decode(line, final=complete)
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
    except OSError as error:
        raise UserError(f"{name}:{number}: cannot be read ({error.strerror}). Check the disk") from error


def _byte_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    r"""Yield lines that end with "\n", as they come, longer ones and the last as they are."""
    chunk: bytes = stream.read1(max(PART_BYTES, 64))  # type: ignore[attr-defined]
    if what := what_it_is(chunk):
        raise UserError(f"{name}: {what}")
    rest, was_return, chunk = b"", False, chunk.removeprefix(codecs.BOM_UTF8)
    while chunk:
        if was_return:  # in the chunk before: its line feed
            chunk = chunk.removeprefix(b"\n")
        was_return = chunk.endswith(b"\r")
        lines = (rest + chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        yield from lines
        while len(rest) > PART_BYTES:
            yield rest[:PART_BYTES]
            rest = rest[PART_BYTES:]
        chunk = stream.read1(PART_BYTES)  # type: ignore[attr-defined]
    if rest:
        yield rest


def whole_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Yield what `read_lines` does, but each line in one part. Raises `UserError` for one above `LINE_CHARACTERS`."""
    parts: list[str] = []
    size = number = 0
    for number, part in read_lines(stream, name):
        parts.append(part)
        size += len(part)
        if size > LINE_CHARACTERS:
            raise UserError(
                f"{name}:{number}: a line of more than {LINE_CHARACTERS:,} characters. Write one record a line"
            )
        if part.endswith("\n"):
            yield number, "".join(parts)
            parts, size = [], 0
    if parts:
        yield number, "".join(parts)


def lines_of(name: str, report: Report = no_report) -> Iterator[tuple[int, str]]:
    """Yield the `whole_lines` of a file."""
    with open_binary(Path(name), report) as stream:
        yield from whole_lines(stream, name)


def json_object(where: str, line: str) -> Record:
    """Return the JSON object in a line. Raises UserError, naming the `where`, if there is none, or a name is twice."""
    fix = "Write one object a line"
    if line.lstrip().startswith("["):
        raise UserError(f"{where}: not a JSON object but an array. {fix}, e.g. with jq -c '.[]'")
    try:
        record = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: not valid JSON ({reason}). {fix}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object. {fix}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f'the name "{twice}" is there twice')
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
