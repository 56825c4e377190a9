"""Every task trains on, and answers, the same records in every format."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leanbert.data.batches.sentences import Sentence
from leanbert.data.classification import ClassificationData
from leanbert.data.mlm import MaskedLMData
from leanbert.data.pairs import PairData
from leanbert.data.token_labels import SemanticRoleData, TokenLabelData
from leanbert.errors import UserError

datasets = pytest.importorskip("datasets")


def formats(folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The rows as JSON lines, columns, and a data set."""
    folder.mkdir(exist_ok=True)
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(folder / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "set"))
    return {"jsonl": f"{folder}/x.jsonl", "parquet": f"{folder}/x.parquet", "hf": f"hf:{folder}/set"}


def settings_of(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"vocab_size": 60, "max_length": 16, "batch_size": 2, "cache_dir": str(folder / "cache"), **settings}


def answered(data: Any, *files: str) -> list[Any]:
    """The texts or sentences of all batches of prediction."""
    data.hparams.update(predict_files=list(files), batch_size=2)
    batches = data.predict_dataloader()
    return [item for batch in batches for item in getattr(batch, "sentences", None) or batch.texts]


# ---- classification


def test_classification_trains_on_files_and_data_sets_together(tmp_path: Path) -> None:
    rows = [{"meta": {"text": f"text {n}"}, "kind": "ab"[n % 2]} for n in range(6)]
    paths = formats(tmp_path / "a", rows[:4])
    paths |= {"csv": str(tmp_path / "more.csv")}
    (tmp_path / "more.csv").write_text("meta.text;kind\ntext 4;a\ntext 5;b\n")
    names = {"text_field": "meta.text", "label_field": "kind"}
    for files, count in (([paths["hf"], paths["csv"]], 6), (paths["hf"], 4), ([paths["parquet"], paths["jsonl"]], 8)):
        data = ClassificationData(**settings_of(tmp_path, train_files=files, val_files=paths["csv"], **names))
        data.setup("fit")
        assert (data.caches["train"].count, sorted(data.labels)) == (count, ["a", "b"])
    evaluated = settings_of(tmp_path, train_files=paths["csv"], val_files=paths["hf"], test_files=paths["parquet"])
    data = ClassificationData(**evaluated, **names)
    data.setup("fit")
    assert (data.cache("val").count, data.cache("test").count) == (4, 4)
    for path in paths.values():
        expected = [f"text {n}" for n in (range(4) if "more" not in path else (4, 5))]
        assert answered(data, path) == expected


def test_pairs_of_texts_to_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"a": "one " * n, "b": "two", "label": str(n % 2)} for n in range(1, 6)]
    paths = formats(tmp_path, rows)
    (tmp_path / "x.txt").write_text("".join(f"{row['a']}\t{row['b']}\n" for row in rows))
    fields = {"text_field": "a", "pair_field": "b", "max_length": 8}
    data = ClassificationData(**{**settings_of(tmp_path, train_files=paths["hf"], val_files=paths["hf"]), **fields})
    data.setup("fit")
    capsys.readouterr()
    for path in (*paths.values(), str(tmp_path / "x.txt")):
        assert answered(data, path) == [f"{row['a']}\ttwo" for row in rows]
        assert capsys.readouterr().err == "1 inputs were longer than data.max_length (8 tokens) and were cut\n"


# ---- words


def test_words_to_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"doc": {"words": ["He", "left"]}, "verb": 1, "tags": ["B-A0", "B-V"]},
        {"doc": {"words": ["a b", "c"]}, "verb": 0, "tags": ["B-V", "O"]},
    ]
    paths = formats(tmp_path, rows)
    fields = {"tokens_field": "doc.words", "labels_field": "tags"}
    roles = SemanticRoleData(**settings_of(tmp_path, train_files=paths["parquet"], val_files=paths["hf"], **fields,
                                           predicate_field="verb"))  # fmt: skip
    tags = TokenLabelData(**settings_of(tmp_path, train_files=paths["hf"], val_files=paths["jsonl"], **fields))
    for data, places in ((roles, (1, 0)), (tags, (None, None))):
        data.setup("fit")
        expected = [Sentence(row["doc"]["words"], place) for row, place in zip(rows, places, strict=True)]
        for path in paths.values():
            assert answered(data, path) == expected
    formats(tmp_path, [{"doc": {"words": ["x"]}}])  # to be answered only: neither tags nor predicate
    for data in (roles, tags):
        for path in paths.values():
            assert answered(data, path) == [Sentence(["x"])]
    (tmp_path / "x.conll").write_text("He O\nleft B-V\n\na O\n")
    (tmp_path / "x.txt").write_text('He  left\n \n{"doc": {"words": ["a b"]}}\n')
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'\nyes\n{"doc.words": ["no"]}\n')))
    capsys.readouterr()
    assert answered(tags, f"{tmp_path}/x.conll", f"{tmp_path}/x.txt", "-") == [
        Sentence(["He", "left"]), Sentence(["a"]), Sentence(["He", "left"]), Sentence(["a b"]), Sentence(["yes"]),
        Sentence(["no"]),
    ]  # fmt: skip
    told = f"2 records without text are left out, the first is {tmp_path}/x.txt:2\n"
    assert capsys.readouterr().err == told
    (tmp_path / "x.txt").write_text('He left\n{"doc": {"words": ["a"]}, "verb": 1}\n{"doc": \n')
    with pytest.raises(UserError, match=r"x\.txt:2: predicate 1 is not the place of one of 1 words"):
        answered(roles, f"{tmp_path}/x.txt")
    with pytest.raises(UserError, match=r"x\.txt:3: not valid JSON"):
        answered(tags, f"{tmp_path}/x.txt")


# ---- pairs


def test_translation_records(tmp_path: Path) -> None:
    rows = [{"translation": {"en": f"{n} x", "de": f"{n} y"}, "more": [f"{n} z"]} for n in range(4)]
    expected = [(f"{n} x", f"{n} y", [f"{n} y", f"{n} z"]) for n in range(4)]
    fields = {"source_field": "translation.en", "target_field": "translation.de", "references_field": "more"}
    for path in formats(tmp_path, rows).values():
        data = PairData(**settings_of(tmp_path, train_files=path, val_files=path, **fields))
        data.setup("fit")
        assert [(pair.source, pair.target, pair.references) for pair in data.pairs("val")] == expected
        assert data.caches["train"].count == 4
        assert answered(data, path) == [source for source, _, _ in expected]


def test_pairs_with_a_blank_side_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.en").write_text("a\n\nb\nc\n\n")
    (tmp_path / "x.de").write_text("A\nx\n \nC\n\n")
    rows = [{"source": s or None, "target": t} for s, t in (("a", "A"), ("", "x"), ("b", " "), ("c", "C"), ("", ""))]
    paths: dict[str, dict[str, Any]] = {path: {} for path in formats(tmp_path, rows).values()}
    paths[f"{tmp_path}/x.en"] = {"val_target_files": f"{tmp_path}/x.de", "train_target_files": f"{tmp_path}/x.de"}
    for path, targets in paths.items():
        data = PairData(**settings_of(tmp_path, train_files=path, val_files=path, **targets))
        assert [(pair.source, pair.target) for pair in data.pairs("val")] == [("a", "A"), ("c", "C")]
        place = f"{path}, row 2" if path.startswith("hf:") or path.endswith("parquet") else f"{path}:2"
        told = f"3 records without text are left out, the first is {place}\n"
        assert capsys.readouterr().err.endswith(told)


def test_sources_that_differ_in_case_or_white_space_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"source": text, "target": "x"} for n in range(40) for text in (f"a text {n}", f"A  Text\n{n}")]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PairData(**settings_of(tmp_path, train_files=f"{tmp_path}/x.jsonl", val_share=0.3))
    sides = [{" ".join(pair.source.lower().split()) for pair in data.pairs(part)} for part in ("train", "val")]
    assert [len(side) for side in sides] == [32, 8]
    assert not sides[0] & sides[1]


# ---- files of evaluation among those of training


def test_files_of_evaluation_are_left_out_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, words in (("a", "one two"), ("val", "three"), ("test", "four")):
        for side in ("en", "de"):
            (tmp_path / f"{part}.{side}").write_text("".join(f"{word} {side}\n" for word in words.split()))
    files = {f"{part}{kind}_files": f"{tmp_path}/{'*' if part == 'train' else part}.{side}"
             for part in ("train", "val", "test") for kind, side in (("", "en"), ("_target", "de"))}  # fmt: skip
    data = PairData(**settings_of(tmp_path, **files))
    data.setup("fit")
    found = {part: [(pair.source, pair.target) for pair in data.pairs(part)] for part in ("train", "val", "test")}
    assert found == {
        "train": [("one en", "one de"), ("two en", "two de")],
        "val": [("three en", "three de")],
        "test": [("four en", "four de")],
    }
    assert data.caches["train"].count == 2
    assert sorted(line for line in capsys.readouterr().err.splitlines() if "left out" in line) == sorted(
        f"data.train{kind}_files: {tmp_path}/{part}.{side} is in data.{part}{kind}_files too, and is left out of "
        "training"
        for part in ("val", "test")
        for kind, side in (("", "en"), ("_target", "de"))
    )
    data = MaskedLMData(**settings_of(tmp_path, train_files=f"{tmp_path}/*.txt", val_files=f"{tmp_path}/val.txt"))
    for part in ("a", "b", "val"):
        (tmp_path / f"{part}.txt").write_text(f"text of {part}")
    data.setup("fit")
    assert (data.statistics["train"].documents, data.statistics["val"].documents) == (2, 1)
    assert f"{tmp_path}/val.txt is in data.val_files too, and is left out of training" in capsys.readouterr().err


def test_masks_to_fill_in_records(tmp_path: Path) -> None:
    paths = formats(tmp_path, [{"in": {"body": f"a [MASK] {n}"}} for n in range(3)])
    settings = settings_of(tmp_path, train_files=[paths["hf"], paths["parquet"]], val_files=paths["jsonl"])
    data = MaskedLMData(**settings, text_field="in.body")
    data.setup("fit")
    assert data.statistics["train"].documents == 6
    for path in paths.values():
        assert answered(data, path) == [f"a [MASK] {n}" for n in range(3)]
    data.hparams.update(predict_files=[paths["hf"]], batch_size=4)
    (batch,) = data.predict_dataloader()
    assert (batch.inputs.input_ids == data.tokenizer.mask_id).sum(1).tolist() == [1, 1, 1]


def test_errors_about_evaluation_name_its_setting(tmp_path: Path) -> None:
    paths = formats(tmp_path, [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}])
    (tmp_path / "empty.csv").write_text("text,label\n")
    for name, message in (("empty.csv", "there is no example in it"), ("none.csv", "no file matches")):
        data = ClassificationData(
            **settings_of(tmp_path, train_files=paths["jsonl"], val_files=f"{tmp_path}/{name}", test_files="none")
        )
        with pytest.raises(UserError, match=rf"^data\.val_files: {message}"):
            data.setup("fit")
    with pytest.raises(UserError, match=r"^data\.test_files: no file matches"):
        data.cache("test")
