from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest

from leanbert.data.formats.documents import document_hash
from leanbert.data.samples import docstring_examples, embedded
from leanbert.data.samples.docstring_examples import origins, summaries, without_repeats
from leanbert.data.samples.docstrings import read_docstrings
from leanbert.data.samples.embedded import embedded_files

BODY = "Each of the words in this body counts, and there must be at least twenty of them, so here come some more."


def _summaries(*docstrings):
    return sorted(
        summaries([("python", list(paragraphs)) for paragraphs in docstrings]), key=lambda row: row["summary"]
    )


def test_a_summary_is_one_short_sentence_and_the_document_what_follows():
    assert _summaries(
        ["Return the sum of values.", BODY],
        ["Return the mean, i.e. the sum divided.", BODY + " More."],  # might be two sentences
        ["Return it. Raise an error if not.", BODY + " More."],
        ["returns what was asked for.", BODY + " More."],
        ["Return what was asked for", BODY + " More."],
        ["Return what was asked for...", BODY + " More."],
        ["A " + "word " * 19 + "more.", BODY + " More."],  # 21 words
        ["Return one of few words.", "The body has not twenty words."],
        ["Return a value with 3.5 digits.", "The first of two.", BODY],
        ["Return what has no body."],
    ) == [
        {"document": f"The first of two. {BODY}", "summary": "Return a value with 3.5 digits."},
        {"document": BODY, "summary": "Return the sum of values."},
    ]


def test_long_documents_are_cut_between_paragraphs():
    fits, too_much = ("word " * 150).strip(), "more " * 51
    assert _summaries(["Return the first paragraphs.", fits, too_much, "End."])[0]["document"] == fits
    assert len(_summaries(["Return the first paragraphs.", fits, "more " * 50])[0]["document"].split()) == 200
    assert _summaries(["Return only what fits.", "word " * 201]) == []


def test_a_document_that_comes_again_is_one_example():
    assert len(_summaries(["Return the first of all.", BODY], ["Return the second of all.", BODY])) == 1
    docstrings = [("a", ["Do one thing.", "Text."]), ("b", ["do ONE thing.", "Other text."]), ("b", ["Do another."])]
    assert list(without_repeats(docstrings)) == [docstrings[0], docstrings[2]]


def test_labels_are_the_libraries_with_most_texts_and_balanced(monkeypatch):
    monkeypatch.setattr(docstring_examples, "LABELS", 2)
    monkeypatch.setattr(docstring_examples, "LARGEST_PER_LABEL", 4)
    docstrings = [(library, [f"{BODY} {library} {number}"]) for library, count in zip("abc", (3, 9, 5), strict=True)
                  for number in range(count)]  # fmt: skip
    docstrings += [("a", ["Too short a text to say where it comes from."])] * 20
    records = origins(docstrings)
    assert sorted(record["label"] for record in records) == ["b"] * 4 + ["c"] * 4
    assert len({record["text"] for record in records}) == 8
    assert records == origins(docstrings[::-1])  # neither choice nor order hangs on the order of files
    assert [record["label"] for record in records] != sorted(record["label"] for record in records)


@pytest.fixture
def few_libraries(monkeypatch):
    found = {name: metadata.distribution(name) for name in ("tqdm", "filelock", "packaging")}
    monkeypatch.setattr(embedded, "installed_libraries", lambda: found)
    monkeypatch.setattr(sys.modules[read_docstrings.__module__], "_standard_files", list)


def test_files_are_made_once_and_split_by_the_text(tmp_path, monkeypatch, few_libraries):
    files = {kind: embedded_files(kind, tmp_path) for kind in ("summarization", "classification")}
    monkeypatch.setattr(docstring_examples, "labelled_docstrings", None)
    assert files["summarization"] == embedded_files("summarization", tmp_path)
    assert len({path for paths in files.values() for path in paths.values()}) == 6
    limits = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}
    fields = {"summarization": ("document", "summary"), "classification": ("text", "label")}
    for kind, paths in files.items():
        assert list(paths) == list(limits)
        for split, (low, high) in limits.items():
            rows = [json.loads(line) for line in paths[split].read_text(encoding="utf-8").splitlines()]
            assert all(tuple(row) == fields[kind] for row in rows)
            assert all(low <= document_hash(row[fields[kind][0]]) < high for row in rows)
            assert len(rows) > 20 or split != "train"
            if (kind, split) == ("classification", "train"):
                assert {row["label"] for row in rows} == {"tqdm", "filelock", "packaging"}


def test_a_failed_harvest_leaves_nothing(tmp_path, monkeypatch, few_libraries):
    def broken(docstrings):
        raise RuntimeError("half way")

    monkeypatch.setattr(docstring_examples, "origins", broken)
    with pytest.raises(RuntimeError):
        embedded_files("summarization", tmp_path)
    assert [path.name for path in (tmp_path / "corpora").iterdir() if not path.name.endswith(".lock")] == []
