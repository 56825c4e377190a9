from __future__ import annotations

import os
from pathlib import Path

import pytest

from leanbert.data.formats.corpora import Corpus
from leanbert.data.store import checksums
from leanbert.data.store.checksums import corpus_digest
from tests.data.corpora import write_corpus


def test_a_digest_is_of_content_and_order_and_format(tmp_path: Path) -> None:
    for name, text in {"a.txt": "one", "b.txt": "two", "c.txt": "one", "d.jsonl": "one"}.items():
        write_corpus(tmp_path / name, [text])

    def digest(*names: str) -> str:
        return corpus_digest(Corpus(tuple(str(tmp_path / name) for name in names)), tmp_path)

    assert digest("a.txt") == digest("c.txt")
    assert len({digest("a.txt"), digest("b.txt"), digest("d.jsonl"), digest("a.txt", "b.txt")}) == 4


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_NS", -1)
    path = write_corpus(tmp_path / "a.txt", ["one"])
    corpus = Corpus((str(path),))
    first = corpus_digest(corpus, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "file_digest", None)
        assert corpus_digest(corpus, tmp_path) == first
    write_corpus(path, ["three"])
    assert corpus_digest(corpus, tmp_path) != first


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "a.txt", ["one"])
    stat = path.stat()
    first = corpus_digest(Corpus((str(path),)), tmp_path)
    write_corpus(path, ["two"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert corpus_digest(Corpus((str(path),)), tmp_path) != first
