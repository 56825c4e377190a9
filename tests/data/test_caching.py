from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leanbert.data import mlm
from leanbert.data.mlm import MaskedLMData
from leanbert.data.store.cache import cache_folder
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences, write_corpus
from tests.data.store.test_documents import digest

PROGRAM = """
import sys
from leanbert.data.mlm import MaskedLMData
MaskedLMData(train_files=sys.argv[1], cache_dir=sys.argv[2], vocab_size=300, val_share=0.1).prepare()
"""


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    return str(write_corpus(tmp_path / "corpus.txt", sentences(ENGLISH, 200)))


def prepare(corpus: str, folder: Path, **settings: object) -> dict[str, str]:
    defaults = {"train_files": [corpus], "cache_dir": str(folder), "vocab_size": 300, "val_share": 0.1}
    MaskedLMData(**(defaults | settings)).prepare()  # type: ignore[arg-type]
    return {name: value for name, value in digest(folder).items() if name != "digests.json"}


@pytest.mark.slow
def test_other_processes_at_the_same_moment_give_the_same_bytes(tmp_path: Path, corpus: str) -> None:
    here = prepare(corpus, tmp_path / "here")
    command = [sys.executable, "-c", PROGRAM, corpus, str(tmp_path / "there")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for process in [subprocess.Popen(command, **pipes) for _ in range(3)]:
        output, error = process.communicate(timeout=300)
        assert (process.returncode, output) == (0, ""), error
    assert prepare(corpus, tmp_path / "there") == here
    assert len(here) == 10  # two files of the tokenizer, and four each of train and val


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(None) == Path("/somewhere/leanbert")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "leanbert"
    assert cache_folder("~/x") == Path.home() / "x"


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
        MaskedLMData(train_files=[corpus], cache_dir=folder, vocab_size=200).prepare()
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
    data = MaskedLMData(train_files=[corpus], cache_dir=str(tmp_path), vocab_size=200, val_share=1e-6)
    data.prepare()
    assert (data.caches["train"].count, data.caches["val"].count) == (7, 1)


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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that tokenizers are trained on."""
    seen: list[str] = []
    train = TextTokenizer.train

    def spy(texts, **settings):  # type: ignore[no-untyped-def]
        seen.extend(texts())
        return train(texts, **settings)

    monkeypatch.setattr(TextTokenizer, "train", spy)
    return seen


def test_held_out_text_does_not_train_the_tokenizer(tmp_path: Path, corpus: str, seen: list[str]) -> None:
    prepare(corpus, tmp_path / "cache")
    assert 150 < len(seen) < 200


def test_large_corpora_train_the_tokenizer_on_a_sample(
    tmp_path: Path, corpus: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlm, "SAMPLE_BYTES", Path(corpus).stat().st_size // 4)
    prepare(corpus, tmp_path / "cache")
    assert 40 <= len(seen) <= 50


def test_large_vocabularies_take_32_bits(tmp_path: Path, corpus: str) -> None:
    given = {"train_files": corpus, "cache_dir": str(tmp_path / "cache"), "vocab_size": 300}
    small, large = MaskedLMData(**given), MaskedLMData(**given)  # type: ignore[arg-type]
    small.prepare()
    large.tokenizer = TextTokenizer.from_json(small.tokenizer.to_json())
    large.tokenizer.vocab_size = 65_537  # type: ignore[misc]
    large.hparams["text_field"] = "other"  # of another cache
    assert small.cache("train").dtypes == {"ids": "uint16"}
    cache = large.cache("train")
    assert cache.dtypes == {"ids": "uint32"}
    assert len(cache.counts("ids")) == 65_537
    assert cache.values("ids").tolist() == small.cache("train").values("ids").tolist()


def test_the_key_follows_content_settings_and_tokenizer(tmp_path: Path, corpus: str) -> None:
    other = write_corpus(tmp_path / "other.txt", sentences(ENGLISH, 20))

    def folder(**settings: object) -> Path:
        given = {"train_files": corpus, "val_files": corpus, "cache_dir": str(tmp_path / "cache"), "vocab_size": 300}
        data = MaskedLMData(**(given | settings))  # type: ignore[arg-type]
        data.prepare()
        return data.caches["train"].folder

    first = folder()
    changes = ({"vocab_size": 250}, {"val_files": None}, {"document_separator": "line"}, {"train_files": str(other)})
    assert len({first, *(folder(**change) for change in changes)}) == 5
    assert folder(max_length=64, batch_size=2, seed=3) == first
