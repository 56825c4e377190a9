from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from pathlib import Path

import pytest

from leanbert.data.formats import readers
from leanbert.data.formats.corpora import records_of
from leanbert.data.formats.readers import open_binary, read_lines, whole_lines
from leanbert.errors import UserError


def lines(data: bytes) -> list[tuple[int, str]]:
    return list(whole_lines(io.BytesIO(data), "x"))


def records(path: Path, content: str | bytes, *wanted: str) -> list[tuple[str, object]]:
    """Places without the folder, and records, of a file with this content."""
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return [(Path(place).name, record) for place, record in records_of(str(path), wanted)]


def refused(path: Path, content: str | bytes, *wanted: str) -> str:
    """The one line of the error about a file with this content, without the folder."""
    with pytest.raises(UserError) as caught:
        records(path, content, *wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


# ---- lines


class Pipe(io.BytesIO):
    """Gives some bytes at a time, and counts the reads."""

    def __init__(self, *parts: bytes) -> None:
        super().__init__()
        self.parts, self.reads = list(parts), 0

    def read1(self, size: int | None = -1) -> bytes:
        self.reads += 1
        return self.parts.pop(0) if self.parts else b""


@pytest.mark.parametrize("part", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems_are_one(monkeypatch: pytest.MonkeyPatch, end: str, part: int) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", part)
    text = f"one{end}{end}zw\u00f6 \U0001f600{end} three".encode()
    expected = [(1, "one\n"), (2, "\n"), (3, "zw\u00f6 \U0001f600\n"), (4, " three")]
    assert lines(codecs.BOM_UTF8 + text) == expected
    pipe = Pipe(*(text[at : at + part] for at in range(0, len(text), part)))
    assert list(whole_lines(pipe, "x")) == expected


def test_only_line_ends_end_a_line() -> None:
    text = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\n"
    assert lines((text * 2).encode()) == [(1, text), (2, text)]


def test_a_pipe_gives_its_lines_as_they_come() -> None:
    pipe = Pipe(b"one\r", b"\n", b"two", b"\nthr", b"ee")
    found = read_lines(pipe, "x")
    assert next(found) == (1, "one\n")
    assert pipe.reads == 1
    assert next(found) == (2, "two\n")
    assert pipe.reads == 4
    assert list(found) == [(3, "three")]


def test_an_endless_line_is_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 100)
    monkeypatch.setattr(readers, "LINE_CHARACTERS", 1000)
    content = '{"a": 1}\n{"a": "' + "b" * 5000
    assert refused(tmp_path / "x.jsonl", content) == (
        "x.jsonl:2: a line of more than 1,000 characters. Write one record a line"
    )


def test_several_gzip_members_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"one\ntw") + gzip.compress(b"o\n"))
    with open_binary(path) as stream:
        assert [line for _, line in read_lines(stream, "x")] == ["one\n", "two\n"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "lfs": ("x.jsonl", LFS, "x.jsonl: is a pointer of Git LFS, not the file itself. Run: git lfs pull"),
    "utf16 le": ("x.jsonl", '{"a": "b"}'.encode("utf-16"), "x.jsonl: is UTF-16, not UTF-8. Convert it: iconv"),
    "utf16 be": ("x.csv", codecs.BOM_UTF16_BE + "a".encode("utf-16-be"), "x.csv: is UTF-16, not UTF-8. Convert"),
    "utf16 in gzip": ("x.csv.gz", "a,b".encode("utf-16"), "x.csv.gz: is UTF-16, not UTF-8. Convert"),
    "utf16 without mark": ("x.csv", "a\n".encode("utf-16-le"), "x.csv:1: holds a NUL byte, which no text does but UTF"),
    "gzip": ("x.jsonl", gzip.compress(b"{}"), "x.jsonl: is compressed with gzip. Give it a name that ends in .gz"),
    "bzip2": ("x.txt", bz2.compress(b"a"), "x.txt: is compressed with bzip2. Unpack it"),
    "xz": ("x.txt", lzma.compress(b"a"), "x.txt: is compressed with xz. Unpack it"),
    "zstd": ("x.txt", b"\x28\xb5\x2f\xfd and so on", "x.txt: is compressed with zstd. Unpack it"),
    "workbook": ("x.csv", b"PK\x03\x04 and so on", "x.csv: is a zip archive or a workbook, not text. Unpack it"),
    "parquet": ("x.jsonl", b"PAR1 and so on", "x.jsonl: is in parquet format. Give it a name that ends in .parquet"),
    "nul": ("x.jsonl", b'{"a": "b"}\n{"a": "\0"}\n', "x.jsonl:2: holds a NUL byte, which no text does but UTF-16."),
    "utf8": ("x.csv", b"a\nfine\nb\xffd\n", "x.csv:3: not valid UTF-8 (invalid start byte). Convert the file"),
    "surrogate": ("x.csv", b"a\n\xed\xa0\x80\n", "x.csv:2: not valid UTF-8 (invalid continuation byte). Convert"),
    "utf8 in the end": ("x.csv", b"a\n\xe4\xb8", "x.csv:2: not valid UTF-8 (unexpected end of data). Convert"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_no_text_is_called_by_its_name(tmp_path: Path, case: str) -> None:
    name, content, message = FOREIGN[case]
    assert refused(tmp_path / name, content, "a").startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jsonl.gz: not compressed with gzip. Give it a name without .gz"),
        (b'{"a": 1}', "x.jsonl.gz: not compressed with gzip. Give it a name without .gz"),
        (LFS, "x.jsonl.gz: is a pointer of Git LFS, not the file itself. Run: git lfs pull"),
        (gzip.compress(b'{"a": 1}\n' * 9)[:-9], "x.jsonl.gz:10: the compressed file is cut short or damaged"),
        (gzip.compress(b'{"a": 1}\n')[:-8] + b"12345678", "x.jsonl.gz:2: the compressed file is cut short or damaged"),
        (gzip.compress(b'{"a": 1}\n') + b"more", "x.jsonl.gz:2: the compressed file is cut short or damaged"),
    ],
    ids=["empty", "plain", "pointer", "cut", "checksum", "trailing"],
)
def test_damaged_gzip(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(records_of(str(path), ()))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_disk_that_fails_names_the_line() -> None:
    class Disk(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read1(9)

    with pytest.raises(UserError, match=r"^x:2: cannot be read \(Input/output error\)"):
        list(read_lines(Disk(b"one line\nanother"), "x"))


# ---- JSON


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines(tmp_path: Path, end: str) -> None:
    content = end.join(['{"a": "x\u2028\x85y"}', "", '{"a": [1, {"b": null}]} ', "\t", '{"a": 1e3, "c": "\\u0000"}'])
    assert records(tmp_path / "x.jsonl", content) == [
        ("x.jsonl:1", {"a": "x\u2028\x85y"}),
        ("x.jsonl:3", {"a": [1, {"b": None}]}),
        ("x.jsonl:5", {"a": 1000.0, "c": "\0"}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": ', "x.jsonl:2: not valid JSON (Expecting value, column 7). Write one object a line"),
        ('{"a": 1} {"a": 2}', "x.jsonl:2: not valid JSON (Extra data"),
        ('{"a": 1},', "x.jsonl:2: not valid JSON (Extra data"),
        ("{'a': 1}", "x.jsonl:2: not valid JSON (Expecting property name"),
        ('\ufeff{"a": 1}', "x.jsonl:2: not valid JSON ("),
        ('{"a": 1, "b": 2, "a": 3}', 'x.jsonl:2: not valid JSON (the name "a" is there twice)'),
        ('{"a": {"b": 1, "b": 1}}', 'x.jsonl:2: not valid JSON (the name "b" is there twice)'),
        ('{"a": %s}' % ("[" * 100_000), "x.jsonl:2: not valid JSON (maximum recursion depth exceeded"),
        ('{"a": %s}' % ("1" * 5000), "x.jsonl:2: not valid JSON (Exceeds the limit"),
        ("[", "x.jsonl:2: not a JSON object but an array. Write one object a line, e.g. with jq -c '.[]'"),
        ('[{"a": 1}, {"a": 2}]', "x.jsonl:2: not a JSON object but an array."),
        ('"text"', "x.jsonl:2: not a JSON object. Write one object a line"),
        ("null", "x.jsonl:2: not a JSON object. Write one object a line"),
    ],
)
def test_what_is_no_json_object_on_a_line(tmp_path: Path, line: str, message: str) -> None:
    assert refused(tmp_path / "x.jsonl", f'{{"a": "fine"}}\n{line}\n{{"a": "not reached"}}').startswith(message)
