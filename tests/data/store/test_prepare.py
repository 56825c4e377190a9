from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leanbert.data.store import prepare as prepare_module
from leanbert.data.store.prepare import CorpusSettings
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences, write_corpus
from tests.data.store.test_token_cache import digest

PROGRAM = """
import sys
from leanbert.data.store.prepare import CorpusSettings
CorpusSettings(train_files=[sys.argv[1]], cache_dir=sys.argv[2], vocab_size=300, val_share=0.1).prepare()
assert "torch" not in sys.modules, "preparing paid for torch"
"""


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return str(write_corpus(tmp_path / "corpus.txt", sentences(ENGLISH, 200)))


def prepare(corpus: str, folder: Path, **settings: object) -> dict[str, str]:
    defaults = {"train_files": [corpus], "cache_dir": str(folder), "vocab_size": 300, "val_share": 0.1}
    CorpusSettings(**(defaults | settings)).prepare()  # type: ignore[arg-type]
    return {name: value for name, value in digest(folder).items() if name != "digests.json"}


def test_other_processes_at_the_same_moment_give_the_same_bytes_without_torch(tmp_path: Path, corpus: str) -> None:
    here = prepare(corpus, tmp_path / "here")
    command = [sys.executable, "-c", PROGRAM, corpus, str(tmp_path / "there")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for process in [subprocess.Popen(command, **pipes) for _ in range(3)]:
        output, error = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, ""), error
    assert prepare(corpus, tmp_path / "there") == here
    assert len(here) == 10  # two files of the tokenizer, and four each of train and val


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert CorpusSettings().cache_folder == Path("/somewhere/leanbert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert CorpusSettings().cache_folder == Path.home() / ".cache" / "leanbert"
    assert CorpusSettings(cache_dir="~/x").cache_folder == Path.home() / "x"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("", r"data\.cache_dir: is empty"),
        ("a\0b", r"data\.cache_dir: 'a\\x00b' is not a path"),
        ("~nosuchuser/x", r"data\.cache_dir: ~nosuchuser/x: there is no such user"),
        ("/proc/x", r"/proc/x/tokenizers: cannot be written \(No such file or directory\)"),
        ("/dev/null", r"cannot be written \(Not a directory\)"),
        ("FILE", r"cannot be written \(Not a directory\)"),
        ("n" * 300, r"cannot be written \(File name too long\)"),
        ("LOOP", r"cannot be written \(Too many levels of symbolic links\)"),
    ],
)
def test_a_folder_that_cannot_serve_is_one_line(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, folder: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    Path("LOOP").symlink_to("LOOP")
    with pytest.raises(UserError, match=message) as caught:
        CorpusSettings(train_files=[corpus], cache_dir=folder, vocab_size=200).prepare()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith((" with --data.cache_dir", "leave it out", "a zero byte", "in full"))


def test_a_moved_corpus_is_the_same_and_a_changed_one_is_not(tmp_path: Path, corpus: str) -> None:
    before = prepare(corpus, tmp_path / "cache")
    moved = Path(corpus).rename(tmp_path / "moved.txt")
    assert prepare(str(moved), tmp_path / "cache") == before
    moved.write_text(moved.read_text() + "\none more document\n")
    assert len(prepare(str(moved), tmp_path / "cache")) > len(before)


def test_a_small_corpus_holds_out_one_document(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "small.txt", sentences(ENGLISH, 8)))
    settings = CorpusSettings(train_files=[corpus], cache_dir=str(tmp_path), vocab_size=200, val_share=1e-6)
    prepared = settings.prepare()
    assert (prepared.train.documents, prepared.val.documents) == (7, 1)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    corpus = str(write_corpus(tmp_path / "one.txt", ["only one document here"]))
    with pytest.raises(UserError, match=r"data\.val_share: 0\.1 leaves no document to train on"):
        prepare(corpus, tmp_path / "cache")


def test_empty_files_are_refused(tmp_path: Path, corpus: str) -> None:
    empty = str(write_corpus(tmp_path / "empty.txt", [""]))
    with pytest.raises(UserError, match=r"data\.train_files: the corpus is empty"):
        prepare(empty, tmp_path / "cache")
    with pytest.raises(UserError, match=r"data\.val_files: the corpus is empty"):
        prepare(corpus, tmp_path / "cache", val_files=[empty])


def test_held_out_text_does_not_train_the_tokenizer(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = prepare_module.TextTokenizer.train

    def spy(texts, **settings):  # type: ignore[no-untyped-def]
        seen.extend(texts())
        return train(texts, **settings)

    monkeypatch.setattr(prepare_module.TextTokenizer, "train", spy)
    prepare(corpus, tmp_path / "cache")
    assert 150 < len(seen) < 200


def test_large_corpora_train_the_tokenizer_on_a_sample(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = prepare_module.TextTokenizer.train

    def spy(texts, **settings):  # type: ignore[no-untyped-def]
        seen.extend(texts())
        return train(texts, **settings)

    monkeypatch.setattr(prepare_module.TextTokenizer, "train", spy)
    monkeypatch.setattr(prepare_module, "SAMPLE_BYTES", Path(corpus).stat().st_size // 4)
    prepare(corpus, tmp_path / "cache")
    assert 40 <= len(seen) <= 50
