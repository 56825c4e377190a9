from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from leanbert.data.tokenizers.classes import SPECIAL_TOKENS
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.data.tokenizers.training import LONGEST_WORD, _bounded, sample_evenly
from leanbert.errors import UserError
from tests.data.corpora import CHINESE, ENGLISH, MULTILINGUAL, sentences

PROGRAM = """
import hashlib, sys
from tests.data.corpora import *
from leanbert.data.tokenizers.tokenizer import TextTokenizer
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


DNA = "".join(random.Random(2).choices("ACGT", k=150_000))
THAI = "ภาษาไทยเป็นภาษาที่ไม่มีช่องว่างระหว่างคำ "
KANA = "ひらがなとカタカナだけで、かいたぶんしょうです。 "
KHMER = "ភាសាខ្មែរគឺជាភាសាផ្លូវការរបស់ប្រទេសកម្ពុជា "
BURMESE = "မြန်မာဘာသာစကားသည်မြန်မာနိုင်ငံ၏ရုံးသုံးဘာသာစကားဖြစ်သည် "
LAO = "ພາສາລາວເປັນພາສາທາງການຂອງປະເທດລາວ "
HINDI = "हिन्दी विश्व की एक प्रमुख भाषा है "
KOREAN = "한국어는 한반도에서 사용하는 언어이다 "


def model_of(tokenizer: TextTokenizer) -> str:
    return json.loads(tokenizer.to_json())["model"]["type"]


@pytest.mark.parametrize(
    "text", [DNA, THAI, KANA, KHMER, BURMESE, LAO], ids=["dna", "thai", "kana", "khmer", "burmese", "lao"]
)
def test_text_without_spaces_gets_bytes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = TextTokenizer.train(lambda: [text * 3], vocab_size=400)
    said = capsys.readouterr().err
    assert model_of(tokenizer) == "BPE"
    assert said.count("\n") == 1
    assert "no spaces between words: byte-level BPE is trained in place of WordPiece (data.tokenizer_kind)" in said
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]).strip() == text.lower().strip()


@pytest.mark.parametrize("text", [HINDI, KOREAN, "".join(CHINESE), " ".join(ENGLISH), " ".join(MULTILINGUAL)])
def test_other_text_gets_words(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [text * 5] * 20 + [THAI]
    tokenizer = TextTokenizer.train(lambda: documents, vocab_size=400)
    assert tokenizer.to_json() == TextTokenizer.train(lambda: documents, vocab_size=400, kind="wordpiece").to_json()
    assert capsys.readouterr().err == ""


def test_a_kind_that_is_asked_for_is_trained_on_any_text() -> None:
    assert model_of(TextTokenizer.train(lambda: [THAI], vocab_size=400, kind="wordpiece")) == "WordPiece"
    assert model_of(TextTokenizer.train(lambda: [THAI], vocab_size=260)) == "WordPiece"  # too few for bytes


def test_endless_words_are_cut_for_training() -> None:
    plain = ["a b " * 2000, "word" * (LONGEST_WORD // 4), "", DNA[:LONGEST_WORD] + " " + DNA[:5]]
    assert list(_bounded(plain)) == plain
    assert list(_bounded([f"a {DNA[:2500]} b"])) == [f"a {DNA[:1000]}", DNA[1000:2000], f"{DNA[2000:2500]} b"]
    assert [len(part) for part in _bounded(["\n" * 2500 + "a"])] == [1000, 1000, 501]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_training_is_not_quadratic_in_the_length_of_a_word(kind: str) -> None:
    # Quadratic, these 600,000 letters take minutes.
    tokenizer = TextTokenizer.train(lambda: [DNA * 4], vocab_size=600, kind=kind)
    assert tokenizer.vocab_size == 600
    assert (tokenizer.encode_batch([DNA])[0] == [2, 1, 3]) == (kind == "wordpiece")


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
@pytest.mark.parametrize("lowercase", [True, False])
def test_accents_are_a_setting(kind: str, lowercase: bool) -> None:
    documents = sentences(MULTILINGUAL, 200)

    def written(strip_accents: bool | None) -> str:
        settings = {"kind": kind, "vocab_size": 500, "lowercase": lowercase, "strip_accents": strip_accents}
        tokenizer = TextTokenizer.train(lambda: documents, **settings)
        return tokenizer.decode(tokenizer.encode_batch(["Über Zoë"])[0]).strip()

    kept, stripped = ("über zoë", "uber zoe") if lowercase else ("Über Zoë", "Uber Zoe")
    assert (written(False), written(True)) == (kept, stripped)
    assert written(None) == (stripped if kind == "wordpiece" and lowercase else kept)
