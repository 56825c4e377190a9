"""Variants of an earlier run leave the folder, and nothing else does."""

import json

import pytest

from leanbert.compression_report.earlier import files_of, listed_files, remove_files
from leanbert.compression_report.report import Row
from leanbert.errors import UserError


@pytest.fixture
def output(tmp_path):
    """What a run has left of two variants, with files of the user's among them."""
    output = tmp_path / "out"
    files = ["int8/model.onnx", "int8/hf/config.json", "int4/model.onnx", "int4/mine.txt", "training/a/b", "mine.txt"]
    for name in files:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    others = {output / "int4/mine.txt"}
    listed = files_of(output, [Row("int8", ["quantize=int8"], "x"), Row("int4", [], "x"), Row("none", [], "x")], others)
    assert listed == ["int4/model.onnx", "int8/hf/config.json", "int8/model.onnx"]
    (tmp_path / "outside").write_text("")
    (output / "report.json").write_text(json.dumps({"files": [*listed, "gone/model.onnx", "../outside"]}))
    return output


def test_what_the_report_lists_goes_and_nothing_else(tmp_path, output):
    left = remove_files(output, listed_files(output, tmp_path / "a.ckpt"))
    names = {"int4", "int4/mine.txt", "training", "training/a", "training/a/b", "mine.txt", "report.json"}
    assert {path.relative_to(output).as_posix() for path in left} == names
    assert (tmp_path / "outside").is_file()
    assert listed_files(tmp_path / "new", tmp_path / "a.ckpt") == []


@pytest.mark.parametrize("source", ["int8/hf", "int8", "int4/model.onnx"])
def test_the_model_that_is_compressed_is_not_removed(output, source):
    with pytest.raises(UserError, match=r"^--output: would replace .*, the model to compress\. Choose another folder$"):
        listed_files(output, output / source)
    listed_files(output, output / "training/a")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": 3}', '{"files": [3]}'])
def test_a_report_of_another_program_is_not_replaced(output, text):
    (output / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"report\.json does not list files of variants\. Choose another folder$"):
        listed_files(output, output / "a.ckpt")
