from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from leanbert.data.tokenizer import TextTokenizer
from leanbert.data.tokenizer_classes import SPECIAL_TOKENS
from leanbert.data.tokenizer_training import sample_evenly
from leanbert.errors import UserError
from tests.data.corpora import CHINESE, ENGLISH, MULTILINGUAL, sentences

PROGRAM = """
import hashlib, sys
from tests.data.corpora import *
from leanbert.data.tokenizer import TextTokenizer
documents = sentences(ENGLISH + MULTILINGUAL + list(CHINESE), 300)
tokenizer = TextTokenizer.train(lambda: documents, kind=sys.argv[1], vocab_size=600)
print(hashlib.sha256(tokenizer.to_json().encode()).hexdigest())
"""


def vocabulary(tokenizer: TextTokenizer) -> dict[str, int]:
    entries = json.loads(tokenizer.to_json())["model"]["vocab"]
    return entries if isinstance(entries, dict) else {piece: i for i, (piece, _) in enumerate(entries)}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_the_same_bytes_in_any_process(kind: str) -> None:
    documents = sentences(ENGLISH + MULTILINGUAL + list(CHINESE), 300)
    here = TextTokenizer.train(lambda: documents, kind=kind, vocab_size=600).to_json()
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, kind], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    there = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert there == {hashlib.sha256(here.encode()).hexdigest()}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_size_special_tokens_and_template(kind: str) -> None:
    documents = sentences(ENGLISH, 200)
    tokenizer = TextTokenizer.train(lambda: documents, kind=kind, vocab_size=420)
    assert 300 < tokenizer.vocab_size <= 420
    assert [tokenizer.token(i) for i in range(5)] == list(SPECIAL_TOKENS)
    assert tokenizer.special_ids == [0, 1, 2, 3, 4]
    assert tokenizer.template == ([2], [3])
    ids = tokenizer.encode_batch(["the river runs"])[0]
    assert len(ids) == 5
    assert tokenizer.decode(ids).strip() == "the river runs"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_mask_takes_the_space_before_it(kind: str) -> None:
    documents = sentences(ENGLISH, 200)
    tokenizer = TextTokenizer.train(lambda: documents, kind=kind, vocab_size=300)
    masked = tokenizer.encode_batch(["and the [MASK] runs"])[0]
    whole = tokenizer.encode_batch(["and the river runs"])[0]
    assert masked[: masked.index(4)] == whole[: masked.index(4)]
    assert len(masked) == len(whole)


def test_lowercase_is_a_setting() -> None:
    documents = sentences(MULTILINGUAL, 200)
    lower = TextTokenizer.train(lambda: documents, vocab_size=400)
    cased = TextTokenizer.train(lambda: documents, vocab_size=400, lowercase=False)
    assert {"uber", "apfel"} <= set(vocabulary(lower))
    assert {"Über", "größere", "привет", "Ελλάδα"} <= set(vocabulary(cased))
    assert cased.decode(cased.encode_batch(["Über Zoë"])[0]) == "Über Zoë"
    assert lower.decode(lower.encode_batch(["Über Zoë"])[0]) == "uber zoe"


def test_chinese_is_split_by_character_and_cannot_fill_the_vocabulary() -> None:
    documents = sentences(CHINESE, 300)
    tokenizer = TextTokenizer.train(lambda: documents, vocab_size=200)
    ids = tokenizer.encode_batch(["床前明月光"])[0]
    assert [tokenizer.token(i) for i in ids[1:-1]] == list("床前明月光")
    assert not [token for token in vocabulary(tokenizer) if token.startswith("##") and token[2:] in CHINESE]
    tiny = TextTokenizer.train(lambda: documents, vocab_size=40)
    assert sum(token in CHINESE for token in vocabulary(tiny)) <= 20
    assert tiny.vocab_size <= 40


@pytest.mark.parametrize(("kind", "size", "least"), [("wordpiece", 5, 13), ("bpe", 200, 261), ("unigram", 3, 13)])
def test_a_vocabulary_too_small_is_refused(kind: str, size: int, least: int) -> None:
    with pytest.raises(UserError, match=rf"data\.vocab_size: {size} .* at least {least}"):
        TextTokenizer.train(lambda: ["a"], kind=kind, vocab_size=size)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_an_empty_corpus_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="corpus is empty"):
        TextTokenizer.train(lambda: iter(()), kind=kind, vocab_size=300)


def test_samples_are_spread_evenly() -> None:
    def numbers() -> Iterator[str]:
        return map(str, range(1000))

    assert list(sample_evenly(numbers(), 3.0)) == list(numbers())
    quarter = [int(text) for text in sample_evenly(numbers(), 0.25)]
    assert quarter == list(range(3, 1000, 4))
