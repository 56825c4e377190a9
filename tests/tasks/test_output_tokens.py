import builtins

import pytest

from leanbert.errors import UserError
from leanbert.tasks.output_tokens import bleu_kind, bleu_tokenizer, rouge_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's a red-haired_dog, 3.5 KM!", ["it", "s", "a", "red", "haired", "dog", "3", "5", "km"]),
        ("Die Brücke heißt „Größe“", ["die", "brücke", "heißt", "größe"]),
        ("Bru\u0308cke \uff21\uff22\uff11 \ufb01n", ["br\u00fccke", "ab1", "fin"]),  # one form for what looks the same
        ("नदी बहती है।", ["नदी", "बहती", "है"]),  # vowel signs are marks
        ("山水ABC三3.5个", ["山", "水", "abc", "三", "3", "5", "个"]),
        ("私は。カメラー", ["私", "は", "カ", "メ", "ラ", "ー"]),
        ("ที่ดี", ["ที่", "ดี"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("\u0301 — !", []),
    ],
)
def test_words_of_any_script(text, tokens):
    assert rouge_tokens(text) == tokens


def test_other_tokens():
    assert rouge_tokens("Brücke 山 x", "ascii") == ["br", "cke", "x"]
    assert rouge_tokens("नदी ab", "characters") == ["न", "दी", "a", "b"]


@pytest.mark.parametrize(
    ("references", "kind"),
    [(["山水 is"], "13a"), (["山水月 is"], "zh"), (["私は東京"], "char"), (["山" * 20 + "は"], "zh"), ([], "13a")],
)
def test_most_letters_decide(references, kind):
    assert bleu_kind("auto", references) == kind
    assert bleu_kind("intl", references) == "intl"


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("ja-mecab", r"pip install 'sacrebleu\[ja\]'"),
        ("flores200", "pip install sacrebleu sentencepiece"),
    ],
)
def test_what_is_not_installed_is_named(kind, command, monkeypatch):
    missing, importing = ("MeCab", "sentencepiece", "ipadic"), builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] in missing:
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    bleu_tokenizer.cache_clear()
    with pytest.raises(
        UserError, match=rf"^model\.bleu_tokenize: {kind} needs what is not here .*\. Run {command}, or"
    ):
        bleu_tokenizer(kind)


@pytest.mark.parametrize("kind", ["13a", "intl", "zh", "char"])
def test_white_space_at_the_end_is_no_token(kind):
    assert bleu_tokenizer(kind)("a b 5% \n") == bleu_tokenizer(kind)("a b 5%")
