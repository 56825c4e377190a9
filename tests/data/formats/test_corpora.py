from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from leanbert.data.formats import documents, readers
from leanbert.data.formats.corpora import Corpus, besides
from leanbert.data.formats.documents import document_hash
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
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 50)
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
    written = [f"document number {n}" for n in range(2000)]
    write(tmp_path / "a.txt", "\n\n".join(written))
    write(tmp_path / "b.txt", "\n\n".join(reversed(written)))
    held = [{piece.text for piece in Corpus((str(tmp_path / name),)).pieces(high=0.1)} for name in ("a.txt", "b.txt")]
    rest = {piece.text for piece in Corpus((str(tmp_path / "a.txt"),)).pieces(low=0.1)}
    assert held[0] == held[1]
    assert len(held[0]) == 200
    assert held[0] | rest == set(written)
    assert not held[0] & rest


def test_case_and_white_space_do_not_decide_the_side() -> None:
    for text in ("A b\nc", "a B C", " a\tb  c\r\n", "A\u00a0B\u2028C"):
        assert document_hash(text) == document_hash("a b c") == 0.19061334583707534
    assert document_hash("a bc") != document_hash("a b c")
    assert document_hash("Stra\u00dfe") == document_hash("STRASSE")


def test_white_space_across_parts_ends_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PART_BYTES", 4)
    space = " " * 99
    path = write(tmp_path / "a.txt", f"one\n{space}two\n{space}\nthree\n{space}")
    assert texts(path) == [f"one\n{space}two", "three"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems_separate_documents(tmp_path: Path, end: str) -> None:
    path = write(tmp_path / "a.txt", end.join(["one", "one\u2028\x0c\x85", "", "", "two"]))
    assert texts(path) == ["one\none", "two"]
    assert texts(path, separator="line") == ["one", "one", "two"]


def test_records_without_text_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two"}\n')
    second = write(tmp_path / "b.csv", 'text\n""\nthree\n')
    for _ in range(2):
        assert texts(first, second, setting="data.val_files") == ["one", "two", "three"]
    told = f"3 records without text are left out, the first is {first}:2\n"
    assert capsys.readouterr().err == told


# ---- files of evaluation among those of training


def test_files_of_evaluation_that_a_glob_matches_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "val.txt", "test.txt"):
        write(Path(name), name)
    Path("z.txt").symlink_to("val.txt")
    Path("y.txt").hardlink_to("test.txt")
    others = {"data.val_files": [str(tmp_path / "v*.txt")], "data.test_files": ["test.txt"]}
    assert besides(["*.txt", "hf:x"], "data.train_files", others) == ["a.txt", "hf:x"]
    assert capsys.readouterr().err.splitlines() == [
        f"data.train_files: {name}.txt is in data.{part}_files too, and is left out of training"
        for name, part in (("test", "test"), ("val", "val"), ("y", "test"), ("z", "val"))
    ]
    assert besides(["?.txt"], "data.train_files", {"data.val_files": ["a.txt"]}) == ["y.txt", "z.txt"]
    assert besides(["a.*", "hf:x"], "data.train_files", others) == ["a.*", "hf:x"]
    with pytest.raises(UserError, match=r"^data\.train_files: all that matches is in data\.val_files too\. Give other"):
        besides(["a*.txt"], "data.train_files", {"data.val_files": ["a.txt"]})


def test_a_file_of_evaluation_that_is_named_is_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "a.txt", "a"))
    names = [path, f"hf:{tmp_path}:dev"]
    assert besides(names, "data.train_files", {"data.val_files": names[::-1]}) == names
    assert capsys.readouterr().err.splitlines() == [
        f"data.train_files: {name} is in data.val_files too, and is trained on all the same" for name in names
    ]


def test_progress_counts_the_bytes_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", "word " * 100_000)
    read: list[int] = []
    list(Corpus((str(path),)).pieces(report=read.append))
    assert sum(read) == path.stat().st_size


def bad_input(tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    cut = gzip.compress(b"line\n" * 1000)
    return {
        "no match": (tmp_path / "none*.txt", "data.train_files: no file matches"),
        "no user": ("~nosuchuser/x.txt", r'data.train_files: no file matches "~nosuchuser/x\.txt"'),
        "long name": ("x" * 5000 + ".txt", "data.train_files: no file matches"),
        "nul": ("a\0b*", "data.train_files: no file matches"),
        "link to nothing": (_link(tmp_path / "l.txt"), r"l\.txt: no file, or a link to none\. Correct it"),
        "links to nothing": (_link(tmp_path / "ls" / "l.txt").parent / "*", r"ls/l\.txt: no file, or a link to none\."),
        "folder": (tmp_path, r"data.train_files: .* is a folder"),
        "format": (write(tmp_path / "a.pdf", "x"), r"a\.pdf: unknown format"),
        "utf8": (write(tmp_path / "u.txt", b"fine\nalso\nb\xffd\n"), r"u\.txt:3: not valid UTF-8"),
        "utf8 at end": (write(tmp_path / "e.txt", b"fine\n\xe4\xb8"), r"e\.txt:2: not valid UTF-8"),
        "cut gzip": (_raw(tmp_path / "c.txt.gz", cut[:-20]), r"c\.txt\.gz:\d+: the compressed file is cut short"),
        "no gzip": (_raw(tmp_path / "n.txt.gz", b"plain"), r"n\.txt\.gz: not compressed with gzip"),
        "json": (write(tmp_path / "j.jsonl", '{"text": "a"}\n{"text": '), r"j\.jsonl:2: not valid JSON"),
        "field": (write(tmp_path / "f.jsonl", '{"text": "a"}\n{"b": "a"}'), r'f\.jsonl:2: no field "text"\..* is .b.$'),
        "number": (write(tmp_path / "k.jsonl", '{"text": 3}'), r'k\.jsonl:1: no text in field "text" \(int\)'),
        "list": (write(tmp_path / "l.jsonl", "[1]"), r"l\.jsonl:1: not a JSON object"),
        "column": (write(tmp_path / "h.csv", "a,b\n1,2\n"), r'h\.csv:1: no field "text"\. Set .* here is .a., .b.$'),
        "short row": (write(tmp_path / "r.csv", "a,text\n1,2\n3\n"), r"r\.csv:3: 1 cells, the header has 2"),
        "parquet": (write(tmp_path / "p.parquet", "x"), r"p\.parquet: not a readable parquet file"),
    }


def _link(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nothing")
    return path


def _raw(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


CASES = "no match,no user,long name,nul,link to nothing,links to nothing,folder,format,utf8,utf8 at end,cut gzip,"
CASES += "no gzip,json,field,number,list,column,short row,parquet"


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


def test_a_name_may_begin_as_that_of_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~x.txt").write_text("one\n")
    assert Corpus(("~x.txt",)).files == (Path("~x.txt"),)
    assert besides(["~x.txt"], "data.train_files", {"data.val_files": ["~x.txt"]}) == ["~x.txt"]
