"""Damaged files of every format: each is refused in one line, or read as an independent reader reads it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from leanbert.data.formats.corpora import Corpus, records_of
from leanbert.errors import UserError

VARIANTS = 200
BYTES = b'",;\t\r\n\\{}[]:|\0\xff\xef\x80 a1'

TABLE = 'text,label\n"one, ""quoted""\nand more",a\nzwei \u00e4\u4e2d,b\n\n"three",""\nfour,"d"\n'
SMALL = {
    "jsonl": '{"text": "one \u00e4", "label": 1}\n{"label": [1.5, "x"], "text": "\\u4e2d\\n"}\n\n{"text": ""}\n',
    "csv": TABLE,
    "tsv": 'text\tlabel\n"one, a\tb"\na\tb\n\n\tc \n',
    "txt": "one\ntwo \u00e4\n\n \nthree\n\nfour",
}


def damage(data: bytes, random: random.Random) -> bytes:
    """Change, add or leave out a few bytes, repeat some, or cut the rest."""
    for _ in range(random.choice([1, 1, 2, 3])):
        at = random.randrange(len(data) + 1)
        some = bytes([random.choice([random.choice(BYTES), random.randrange(256)])])
        data = random.choice(
            [
                data[:at] + some + data[at + 1 :],
                data[:at] + some + data[at:],
                data[:at] + data[at + 1 :],
                data[:at] + data[at : at + 9] * 2 + data[at + 9 :],
                data[:at],
            ]
        )
    return data


def lines_of(data: bytes) -> list[str]:
    return re.split("\r\n|\r|\n", data.decode("utf-8-sig"))


def jsonl(data: bytes) -> Iterator[tuple[int, object]]:
    yield from ((n, json.loads(line)) for n, line in enumerate(lines_of(data), 1) if line.strip())


def table(data: bytes) -> Iterator[tuple[int, object]]:
    lines = iter(enumerate(lines_of(data), 1))
    started: list[int] = []

    def feed() -> Iterator[str]:
        for number, line in lines:
            started.append(number)
            yield f"{line}\n"

    delimiter = next((d for d in ",;\t|" if re.match(f'\\s*"?text"?[{d}]', data.decode("utf-8-sig"))), ",")
    rows = ((started[0], row, started.clear()) for row in csv.reader(feed(), delimiter=delimiter))
    found = [(number, row) for number, row, _ in rows if row]
    yield from ((number, dict(zip(found[0][1], row, strict=True))) for number, row in found[1:])


def tabs(data: bytes) -> Iterator[tuple[int, object]]:
    found = [(n, line.split("\t")) for n, line in enumerate(lines_of(data), 1) if line]
    yield from ((number, dict(zip(found[0][1], row, strict=True))) for number, row in found[1:])


def documents(data: bytes) -> list[str]:
    groups = groupby(lines_of(data), key=lambda line: not line.strip())
    return [text for blank, group in groups if not blank and (text := "\n".join(group).rstrip())]


INDEPENDENT: dict[str, Callable[[bytes], Any]] = {"jsonl": jsonl, "csv": table, "tsv": tabs, "txt": documents}


def read(path: Path, *wanted: str) -> list[Any] | None:
    """What a file holds, or None if it is refused as it should be."""
    try:
        if path.name.endswith((".txt", ".txt.gz")):
            return [piece.text for piece in Corpus((str(path),)).pieces()]
        return [(int(re.split(":|, row ", place)[-1]), record) for place, record in records_of(str(path), wanted)]
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert message.startswith(str(path)), message
    return None


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", SMALL)
def test_damaged_text(tmp_path: Path, kind: str, packed: str) -> None:
    accepted = 0
    for seed in range(VARIANTS):
        content = SMALL[kind].encode()
        data = damage(gzip.compress(content, mtime=0) if packed else content, random.Random(f"{kind}{seed}"))
        path = tmp_path / f"{seed}.{kind}{packed}"
        path.write_bytes(data)
        found = read(path, "text", "label")
        if found is not None:
            accepted += 1
            plain = gzip.decompress(data) if packed else data
            assert found == list(INDEPENDENT[kind](plain)), plain
    assert accepted >= (1 if packed else VARIANTS // 10)


def test_damaged_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"text": f"text {n} \u00e4", "label": n, "in": {"a": [n], "b": None}} for n in range(40)]
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    for seed in range(VARIANTS):
        path = tmp_path / f"{seed}.parquet"
        path.write_bytes(damage(file.getvalue(), random.Random(seed)))
        found = read(path, "text", "in.a")
        if found is not None:
            table = parquet.read_table(path, columns=["text", "in"])
            assert [record for _, record in found] == table.to_pylist()
