from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from leanbert.data.formats import readers
from leanbert.data.formats.examples import prediction_inputs, prediction_texts, read_records
from leanbert.errors import UserError

ROWS = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]


def write(folder: Path, rows: list[dict[str, object]] = ROWS) -> dict[str, str]:
    """The same records in every format, by format."""
    datasets = pytest.importorskip("datasets")
    names = list(rows[0])
    texts = {
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "csv": "".join(f"{','.join(map(str, row))}\n" for row in [names, *(row.values() for row in rows)]),
    }
    texts["tsv"] = texts["csv"].replace(",", "\t")
    paths = {}
    for kind, text in texts.items():
        (folder / f"x.{kind}").write_text(text, encoding="utf-8")
        (folder / f"x.{kind}.gz").write_bytes(gzip.compress(text.encode()))
        paths |= {name: str(folder / f"x.{name}") for name in (kind, f"{kind}.gz")}
    datasets.Dataset.from_list(rows).to_parquet(folder / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "set"))
    return {**paths, "parquet": str(folder / "x.parquet"), "hf": f"hf:{folder / 'set'}"}


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    paths = write(tmp_path)
    for kind, path in paths.items():
        found = list(read_records([path], "data.train_files", ["label"], ["text"]))
        assert [record for _, record in found] == ROWS, kind
        first = {"parquet": f"{path}, row 1", "hf": f"{path}, row 1"}.get(kind, f"{path}:{1 + (kind[0] != 'j')}")
        assert found[0][0] == first
    everything = list(read_records(list(paths.values()), "data.train_files", ["label"], ["text"]))
    assert [record for _, record in everything] == ROWS * 8  # those of files and of data sets


@pytest.mark.parametrize("blank", [None, "", " \t"])
def test_records_without_text_are_left_out_and_counted(
    tmp_path: Path, blank: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, object]] = [*ROWS, {"text": blank, "label": "a"}, *ROWS, {"text": blank, "label": "b"}]
    for kind, path in write(tmp_path, rows).items():
        if blank is None and kind[:3] in ("csv", "tsv"):  # no null there
            continue
        if blank == " \t" and kind.startswith("tsv"):
            continue
        for _ in range(2):  # said once
            found = [record for _, record in read_records([path], "data.x_files", ["label"], ["text"])]
            assert found == ROWS * 2, kind
        place = f"{path}, row 3" if kind in ("parquet", "hf") else f"{path}:{3 + (kind[0] != 'j')}"
        line = f"2 records without text are left out, the first is {place}\n"
        assert "".join(capsys.readouterr().err.splitlines(keepends=True)[-1:]) == line


def test_what_is_wanted_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"in": {"a": 0, "t": "text"}, "n": null}\n')
    found = list(read_records([str(path)], "data.x_files", ["in.a"], ["in.t"]))
    assert [(record["in.a"], record["in"]["t"]) for _, record in found] == [(0, "text")]
    for field, message in (
        ("b", 'no field "b"\\. Set'),
        ("n", 'no field "n" but null\\. Set the name of the field, or'),
    ):
        with pytest.raises(UserError, match=rf"^{path}:1: {message}"):
            list(read_records([str(path)], "data.x_files", [field]))


def test_endings_in_capitals_are_the_same(tmp_path: Path) -> None:
    paths = [Path(path) for kind, path in write(tmp_path).items() if kind != "hf"]
    loud = [str(path.rename(path.with_name(path.name.upper()))) for path in paths]
    assert [record for _, record in read_records(loud, "data.train_files", ["label"], ["text"])] == ROWS * 7
    assert list(prediction_texts(loud, ["text"])) == [["one"], ["two"]] * 7


# ---- prediction


def test_everything_that_training_reads_can_be_answered(tmp_path: Path) -> None:
    for kind, path in write(tmp_path).items():
        assert list(prediction_texts([path], ["text"])) == [["one"], ["two"]], kind
        assert list(prediction_texts([path], ["text", "label"], 2)) == [["one", "a"], ["two", "b"]], kind


def test_lines_keep_order_and_blank_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.en"
    path.write_bytes("b [MASK]\r\n\na\rx\u2028y\n".encode())
    monkeypatch.setattr(readers, "PART_BYTES", 3)  # a long line is one all the same
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"x\ny")))
    assert list(prediction_inputs([str(path), "-"], ["text"])) == [
        (f"{path}:1", "b [MASK]"), (f"{path}:2", ""), (f"{path}:3", "a"), (f"{path}:4", "x\u2028y"),
        ("standard input:1", "x"), ("standard input:2", "y"),
    ]  # fmt: skip


def test_lines_have_tabs_between_texts_if_there_are_several(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\tb\tc\n\td\n")
    assert list(prediction_texts([str(path)], ["text"])) == [["a\tb\tc"], ["\td"]]
    for fields in (["text"], ["text", "pair"]):
        assert list(prediction_texts([str(path)], fields, 2)) == [["a", "b\tc"], ["", "d"]]


@pytest.mark.parametrize(
    ("line", "fields", "trained", "words"),
    [
        ("a", ["text", "pair"], 2, "one text, but the model was trained on pairs of texts. Put a tab between the two"),
        ("a\tb", ["text", "pair"], 1, "a pair, but the model was trained on single texts. Leave data.pair_field out"),
        ('{"text": "a"}', ["text"], 2, "one text, but the model was trained on pairs of texts. Name the second in"),
        ('{"text": "a", "b": "c"}', ["text", "b"], 1, "a pair, but the model was trained on single texts. Leave data"),
    ],
)
def test_texts_are_as_many_as_in_training(
    tmp_path: Path, line: str, fields: list[str], trained: int, words: str
) -> None:
    path = tmp_path / ("x.jsonl" if line[0] == "{" else "x.txt")
    path.write_text(f"{line}\n")
    with pytest.raises(UserError) as error:
        list(prediction_texts([str(path)], fields, trained))
    assert str(error.value).startswith(f"{path}:1: is {words}")


def test_a_record_without_text_is_answered_as_a_blank_line_is(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": null}\n{"text": "a"}\n{"text": ""}\n')
    assert list(prediction_texts([str(path)], ["text"])) == [[""], ["a"], [""]]
