from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from leanbert.data import readers, sources
from leanbert.data.sources import Corpus, Split, prediction_lines
from leanbert.errors import UserError


def texts(*patterns: object, **settings: object) -> list[str]:
    return [piece.text for piece in Corpus(tuple(map(str, patterns)), **settings).pieces()]  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_blank_lines_separate_documents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n\ufeffone\r\nstill one\n \t\n\ntwo  \n\n")
    assert texts(path) == ["\ufeffone\nstill one", "two"]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", "\ufeffone\n\ntwo")) == ["one", "two"]


def test_one_line_is_a_document_if_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo\n\nthree")
    assert texts(path, separator="line") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"body": "one"}\n\n{"body": "two, \\"quoted\\"", "x": 1}\n{"body": "  "}\n'),
        ("a.jsonl.gz", '{"body": "one"}\n{"body": "two, \\"quoted\\""}'),
        ("a.csv", 'id,body\n1,one\n2,"two, ""quoted"""\n'),
        ("a.tsv", 'body\tid\none\t1\ntwo, "quoted"\t2\n'),
    ],
)
def test_records_give_the_field(tmp_path: Path, name: str, content: str) -> None:
    assert texts(write(tmp_path / name, content), text_field="body") == ["one", 'two, "quoted"']


def test_csv_rows_may_span_lines(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.csv", 'text\n"one\ntwo"\nthree\n')) == ["one\ntwo", "three"]


def test_lone_surrogates_of_json_become_characters(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", r'{"text": "a\ud800b \u4e2d"}')) == ["a?b 中"]


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": ["one", "two", "  "]})
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"dev": dataset}).save_to_disk(str(tmp_path / "dict"))
    assert texts(tmp_path / "a.parquet", text_field="body") == ["one", "two"]
    assert texts(f"hf:{tmp_path}/saved", text_field="body") == ["one", "two"]
    assert texts(f"hf:{tmp_path}/dict:dev", text_field="body") == ["one", "two"]
    for pattern in (tmp_path / "a.parquet", f"hf:{tmp_path}/saved"):
        with pytest.raises(UserError, match=r"data\.text_field"):
            texts(pattern)


def test_globs_are_sorted_and_no_file_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "b.txt", "second")
    write(tmp_path / "a[1].txt", "first")
    assert texts(tmp_path / "**" / "*.txt", tmp_path / "a[1].txt") == ["first", "second"]


def test_long_documents_come_in_pieces_cut_before_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(readers, "PART_BYTES", 16)
    lines = "\n".join(f"line {n} of many wörds" for n in range(20))
    path = write(tmp_path / "a.txt", f"{lines}\n\nshort\n")
    pieces = list(Corpus((str(path),)).pieces())
    assert "".join(piece.text for piece in pieces[:-1]) == lines
    assert all(piece.text[0].isspace() for piece in pieces[1:-1])
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 2) + [True]
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 2) + [True, True]
    assert max(len(piece.text) for piece in pieces) <= 50 + 30
    record = write(tmp_path / "a.jsonl", json.dumps({"text": lines}))
    pieces = list(Corpus((str(record),)).pieces())
    assert "".join(piece.text for piece in pieces) == lines
    assert len(pieces) > 5


def test_held_out_documents_depend_on_text_alone(tmp_path: Path) -> None:
    documents = [f"document number {n}" for n in range(2000)]
    write(tmp_path / "a.txt", "\n\n".join(documents))
    write(tmp_path / "b.txt", "\n\n".join(reversed(documents)))
    held = [
        {piece.text for piece in Split(Corpus((str(tmp_path / name),)), high=0.1).pieces()}
        for name in ("a.txt", "b.txt")
    ]
    rest = {piece.text for piece in Split(Corpus((str(tmp_path / "a.txt"),)), low=0.1).pieces()}
    assert held[0] == held[1]
    assert len(held[0]) == 200
    assert held[0] | rest == set(documents)
    assert not held[0] & rest


def test_progress_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", "word " * 100_000)
    read: list[int] = []
    list(Corpus((str(path),)).pieces(read.append))
    assert sum(read) == path.stat().st_size


def test_prediction_lines_keep_order_and_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.en", "b [MASK]\r\n\na\n")
    monkeypatch.setattr(readers, "PART_BYTES", 3)  # a long line is one all the same
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"x\ny")))
    assert list(prediction_lines([str(path), "-"])) == ["b [MASK]", "", "a", "x", "y"]


def bad_input(tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    cut = gzip.compress(b"line\n" * 1000)
    return {
        "no match": (tmp_path / "none*.txt", "data.train_files: no file matches"),
        "folder": (tmp_path, r"data.train_files: .* is a folder"),
        "format": (write(tmp_path / "a.pdf", "x"), r"a\.pdf: unknown format"),
        "utf8": (write(tmp_path / "u.txt", b"fine\nalso\nb\xffd\n"), r"u\.txt:3: not valid UTF-8"),
        "utf8 at end": (write(tmp_path / "e.txt", b"fine\n\xe4\xb8"), r"e\.txt:2: not valid UTF-8"),
        "cut gzip": (_raw(tmp_path / "c.txt.gz", cut[:-20]), r"c\.txt\.gz:\d+: the compressed file is cut short"),
        "no gzip": (_raw(tmp_path / "n.txt.gz", b"plain"), r"n\.txt\.gz:1: the compressed file is"),
        "json": (write(tmp_path / "j.jsonl", '{"text": "a"}\n{"text": '), r"j\.jsonl:2: not valid JSON"),
        "field": (write(tmp_path / "f.jsonl", '{"text": "a"}\n{"body": "a"}'), r"f\.jsonl:2: no text in field"),
        "number": (write(tmp_path / "k.jsonl", '{"text": 3}'), r"k\.jsonl:1: no text in field"),
        "list": (write(tmp_path / "l.jsonl", "[1]"), r"l\.jsonl:1: not a JSON object"),
        "column": (write(tmp_path / "h.csv", "a,b\n1,2\n"), r"h\.csv:1: no text in field"),
        "short row": (write(tmp_path / "r.csv", "a,text\n1,2\n3\n"), r"r\.csv:3: no text in field"),
        "parquet": (write(tmp_path / "p.parquet", "x"), r"p\.parquet: not a readable parquet file"),
    }


def _raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


CASES = "no match,folder,format,utf8,utf8 at end,cut gzip,no gzip,json,field,number,list,column,short row,parquet"


@pytest.mark.parametrize("case", CASES.split(","))
def test_bad_input_names_file_and_line_in_one_line(tmp_path: Path, case: str) -> None:
    pattern, message = bad_input(tmp_path)[case]
    with pytest.raises(UserError, match=message) as caught:
        texts(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "pattern", "extra"), [("datasets", "hf:x", "hf"), ("pyarrow", "a.parquet", "parquet")]
)
def test_a_missing_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, pattern: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    write(Path("a.parquet"), "x")
    with pytest.raises(UserError, match=rf"pip install \"leanbert\[{extra}\]\""):
        texts(pattern)
