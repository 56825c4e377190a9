from __future__ import annotations

from pathlib import Path

import pytest

from leanbert.data.formats import tables
from tests.data.formats.test_readers import records, refused


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv(tmp_path: Path, end: str) -> None:
    rows = ["", 'text,"la""bel"', '"one, ""two""', '",a', "", "\u2028x\x85,", '"",b']
    assert records(tmp_path / "x.csv", end.join(rows)) == [
        ("x.csv:3", {"text": 'one, "two"\n', 'la"bel': "a"}),
        ("x.csv:6", {"text": "\u2028x\x85", 'la"bel': ""}),
        ("x.csv:7", {"text": "", 'la"bel': "b"}),
    ]


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    assert records(tmp_path / "x.tsv", 'text\tlabel\n"one\ta, "b\n\n \t\n') == [
        ("x.tsv:2", {"text": '"one', "label": 'a, "b'}),
        ("x.tsv:4", {"text": " ", "label": ""}),
    ]


@pytest.mark.parametrize(
    ("delimiter", "name", "said"), [(";", "semicolon", 1), ("\t", "tab", 1), ("|", "bar", 1), (",", "comma", 0)]
)
def test_another_delimiter_is_taken_from_the_header_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], delimiter: str, name: str, said: int
) -> None:
    rows = [f"id{delimiter}text", f'1{delimiter}"a, b{delimiter} c"', f"2{delimiter}d"]
    other = "a, b" if delimiter != "," else "a; b"
    rows.append(f"3{delimiter}{other}")
    path = tmp_path / "x.csv"
    assert [record["text"] for _, record in records(path, "\n".join(rows), "text")] == [
        f"a, b{delimiter} c", "d", other
    ]  # fmt: skip
    line = f"{path}: read with the {name} between cells, as its header has it\n"
    assert capsys.readouterr().err == line * said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\na,b\n\na,b,c\n", "x.csv:4: 3 cells, the header has 2. Quote a text that has a delimiter in it"),
        ("text,label\na,b\na\n", "x.csv:3: 1 cells, the header has 2. Add the missing ones"),
        ("text,label\na,b\n \n", "x.csv:3: 1 cells, the header has 2. Add the missing ones"),
        ('text,label\n"a\nb",c,d\n', "x.csv:2: 3 cells, the header has 2. Quote"),
        ("text,label,text\na,b,c\n", 'x.csv:1: 2 columns are called "text". Rename all but one'),
        ("text,label,label\na,b,c\n", 'x.csv:1: 2 columns are called "label". Rename all but one'),
        ("body,label\na,b\n", 'x.csv:1: no field "text". Set data.text_field; here is'),
        ("body;label\na;b\n", 'x.csv:1: no field "text".'),
        ("text\n" * 2 + '"a' + "\nb" * 300, "x.csv:3: a cell begins with a quote here that does not close it"),
        ('text,label\n"a\nb","c\nd,e\n"f",g\n', "x.csv:3: a cell begins with a quote here that does not close it"),
        ('text,label\na,b\n"c" d,e\n', "x.csv:3: a cell begins with a quote here that does not close it"),
        ('text,label\n"say \\"hi\\"",b\n', "x.csv:2: a cell begins with a quote here that does not close it"),
        ('"text,label\na,b\n', "x.csv:1: a cell begins with a quote here that does not close it"),
    ],
)
def test_what_is_no_table(tmp_path: Path, content: str, message: str) -> None:
    assert refused(tmp_path / "x.csv", content, "text").startswith(message)


def test_columns_without_a_name_may_be_several(tmp_path: Path) -> None:
    assert records(tmp_path / "x.csv", "text,,\na,,\n", "text") == [("x.csv:2", {"text": "a", "": ""})]


def test_an_endless_cell_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CELL_CHARACTERS", 1000)
    content = 'text,label\na,b\n"c,d\n' + "e,f\n" * 10_000 + 'g",h\n'
    message = refused(tmp_path / "x.csv", content, "text")
    assert message.startswith("x.csv:3: a cell begins with a quote here that does not close it (field larger than")
