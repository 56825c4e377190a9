from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from leanbert.data.formats import documents, readers
from leanbert.data.formats.corpora import Corpus
from leanbert.data.store import documents as encoding
from leanbert.data.store import examples as examples_module
from leanbert.data.store.documents import encode_documents
from leanbert.data.store.examples import Example, ExampleCache, build_examples
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from tests.data.corpora import ENGLISH, sentences, write_corpus

DOCUMENTS = sentences(ENGLISH, 300)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(lambda: DOCUMENTS, vocab_size=300)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus((str(write_corpus(tmp_path / "corpus.txt", DOCUMENTS)),))


def build(corpus: Corpus, tokenizer: TextTokenizer, folder: Path) -> ExampleCache:
    def encode(_: object) -> Iterator[Example]:
        return encode_documents(corpus.pieces(), tokenizer)

    return build_examples(
        ["key"], {"ids": "uint16"}, {"ids": tokenizer.vocab_size}, encode, folder, "the corpus is empty"
    )


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("characters", [100, 1 << 20])
def test_holds_every_document_in_the_template(
    tmp_path: Path, corpus: Corpus, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, characters: int
) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", characters)
    cache = build(corpus, tokenizer, tmp_path / "cache")
    expected = tokenizer.encode_batch(DOCUMENTS)
    flat = [i for ids in expected for i in ids]
    assert cache.values("ids").tolist() == flat
    assert cache.offsets("ids").tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert np.array_equal(cache.counts("ids"), np.bincount(flat, minlength=tokenizer.vocab_size))
    assert (cache.count, cache.size("ids"), cache.dtypes) == (300, len(flat), {"ids": "uint16"})


def test_a_document_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n".join(DOCUMENTS)
    path = write_corpus(tmp_path / "long.txt", [text])
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(readers, "PART_BYTES", 64)
    cache = build(Corpus((str(path),)), tokenizer, tmp_path / "cache")
    assert cache.count == 1
    assert cache.values("ids").tolist() == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_pieces_also_for_tokenizers_that_mark_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    text = " ".join(DOCUMENTS[:50])
    path = write_corpus(tmp_path / "long.txt", [text])
    tokenizer = TextTokenizer.train(lambda: DOCUMENTS, kind=kind, vocab_size=300)
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 1000)
    cache = build(Corpus((str(path),)), tokenizer, tmp_path / "cache")
    assert cache.values("ids").tolist() == tokenizer.encode_batch([text])[0]


def test_an_existing_cache_is_not_built_again(
    tmp_path: Path, corpus: Corpus, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(corpus, tokenizer, tmp_path)
    monkeypatch.setattr(examples_module, "_write", None)
    assert build(corpus, tokenizer, tmp_path) == first


def test_pickles_without_its_ids(tmp_path: Path, corpus: Corpus, tokenizer: TextTokenizer) -> None:
    cache = build(corpus, tokenizer, tmp_path)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).values("ids"), cache.values("ids"))


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write_corpus(tmp_path / "blank.txt", ["", "  "])
    with pytest.raises(UserError, match=r"^the corpus is empty$"):
        build(Corpus((str(path),)), tokenizer, tmp_path / "cache")
    assert digest(tmp_path / "cache") == {}


BUILD = """
    import os, signal, sys
    from pathlib import Path
    from leanbert.data.store import documents
    from leanbert.data.store.examples import build_examples
    from leanbert.data.formats.corpora import Corpus
    from leanbert.data.tokenizers.tokenizer import TextTokenizer

    documents.BATCH_CHARACTERS = 2000
    inner, calls = documents.encode_pieces, []

    def encode(*arguments):
        calls.append(1)
        if len(calls) == int(sys.argv[4]):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments)

    documents.encode_pieces = encode
    tokenizer = TextTokenizer.from_file(sys.argv[2])
    build_examples(
        ["key"], {"ids": "uint16"}, {"ids": tokenizer.vocab_size},
        lambda _: documents.encode_documents(Corpus((sys.argv[1],)).pieces(), tokenizer), Path(sys.argv[3]), "nothing",
    )
"""


def test_a_killed_build_leaves_nothing_and_another_equals_an_undisturbed_one(
    tmp_path: Path, corpus: Corpus, tokenizer: TextTokenizer
) -> None:
    tokenizer.save(tmp_path / "tokenizer")

    def run(folder: str, kill_at: int) -> int:
        arguments = [corpus.patterns[0], str(tmp_path / "tokenizer"), str(tmp_path / folder), str(kill_at)]
        return subprocess.run([sys.executable, "-c", textwrap.dedent(BUILD), *arguments], timeout=60).returncode

    assert run("killed", 20) == -signal.SIGKILL
    assert [".tmp-" in path.name for path in (tmp_path / "killed" / "examples").iterdir() if path.is_dir()] == [True]
    assert run("killed", 0) == 0
    assert run("whole", 0) == 0
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert len(digest(tmp_path / "whole")) == 4


@pytest.mark.parametrize("name", ["ids.bin", "ids.offsets.bin", "ids.counts.bin", "meta.json"])
@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_full_disk_says_where_and_keeps_nothing(
    tmp_path: Path, corpus: Corpus, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    class FullFile(io.FileIO):
        write = fail  # type: ignore[assignment]

    real_open = Path.open

    def open_full(path: Path, mode: str = "r", *rest: object, **named: object) -> object:
        if path.name != name or "w" not in mode:
            return real_open(path, mode, *rest, **named)  # type: ignore[call-overload]
        return fail() if call == "open" else FullFile(path, "w")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(UserError, match=r"the disk is full .*--data\.cache_dir") as caught:
        build(corpus, tokenizer, tmp_path / "cache")
    assert str(tmp_path / "cache") in str(caught.value)
    assert digest(tmp_path / "cache") == {}


def test_a_file_size_limit_is_a_full_disk_too(tmp_path: Path, corpus: Corpus, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
    arguments = [corpus.patterns[0], str(tmp_path / "tokenizer"), str(tmp_path / "cache"), "0"]
    command = [sys.executable, "-c", limit + textwrap.dedent(BUILD), *arguments]
    result = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert result.returncode != 0
    assert "UserError" in result.stderr.splitlines()[-1]
    assert "the disk is full" in result.stderr.splitlines()[-1]
    assert digest(tmp_path / "cache") == {}


def test_a_reader_error_leaves_nothing(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes("\n\n".join(DOCUMENTS).encode() + b"\xff")
    with pytest.raises(UserError, match=r"bad\.txt:599: not valid UTF-8"):
        build(Corpus((str(path),)), tokenizer, tmp_path / "cache")
    assert digest(tmp_path / "cache") == {}
