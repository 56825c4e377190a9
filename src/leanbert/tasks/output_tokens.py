"""Where texts are cut into the tokens that BLEU and ROUGE count, by script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Literal

from torchmetrics.functional.text.sacre_bleu import _SacreBLEUTokenizer

from leanbert.errors import UserError

RougeTokens = Literal["auto", "ascii", "characters"]
BleuTokens = Literal["auto", "13a", "zh", "char", "intl", "none", "ja-mecab", "ko-mecab", "flores101", "flores200"]

HAN = "\u3005\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
KANA = "\u3040-\u30ff\u31f0-\u31ff"
SOUTH_EAST = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
UNSPACED = re.compile(f"[{HAN}{KANA}{SOUTH_EAST}]")
"""Characters of scripts that put no space between words."""

PACKAGES = {
    "intl": "regex",
    "ja-mecab": "'sacrebleu[ja]'",
    "ko-mecab": "'sacrebleu[ko]'",
    "flores101": "sacrebleu sentencepiece",
    "flores200": "sacrebleu sentencepiece",
}
"""What the tokenisations of BLEU need that LeanBERT does not."""


def rouge_tokens(text: str, kind: RougeTokens = "auto") -> list[str]:
    """Return the lowercased words of a text, without punctuation.

    Args:
        text: Any text.
        kind: auto: runs of letters, marks and digits of any script, but one character where the script puts no space
            between words; of a text in ASCII these are the tokens of rouge-score. ascii: rouge-score's of any text: all
            but a-z and 0-9 separates. characters: one character of any script, with its marks.

    """
    if kind == "ascii" or (kind == "auto" and text.isascii()):
        return re.findall("[a-z0-9]+", text.lower())
    words: list[str] = []
    grows = takes_marks = False  # the last word
    for character in unicodedata.normalize("NFKC", text).lower():
        category = unicodedata.category(character)[0]
        if category == "M" and takes_marks:
            words[-1] += character
        elif category in "LN":
            alone = kind == "characters" or UNSPACED.match(character) is not None
            if grows and not alone:
                words[-1] += character
            else:
                words.append(character)
            grows, takes_marks = not alone, True
        else:
            grows = takes_marks = False
    return words


def bleu_kind(kind: BleuTokens, references: Iterable[str]) -> BleuTokens:
    """Return the tokenisation; auto: 13a, or zh or char where most letters are of scripts without spaces.

    zh, sacreBLEU's for Chinese, divides Han characters only; char is for what else is written so, such as Japanese.
    """
    if kind != "auto":
        return kind
    letters = [character for text in references for character in text if character.isalpha()]
    unspaced = [character for character in letters if UNSPACED.match(character)]
    if 2 * len(unspaced) <= len(letters):
        return "13a"
    han = sum(re.match(f"[{HAN}]", character) is not None for character in unspaced)
    return "zh" if han > 0.9 * len(unspaced) else "char"


@lru_cache
def bleu_tokenizer(kind: BleuTokens) -> Callable[[str], list[str]]:
    """Return the function that gives sacreBLEU's tokens of a text.

    Raises:
        UserError: It needs a package that is not installed, or a file that cannot be had.
    """
    try:
        if kind in ("13a", "zh", "char", "intl", "none"):
            own = _SacreBLEUTokenizer(kind, lowercase=False)
            return lambda text: list(own(text.rstrip()))  # as sacreBLEU does
        from sacrebleu.metrics import BLEU

        tokenizer = BLEU(tokenize=kind).tokenizer
        tokenizer("a")  # some load their files only now
        return lambda text: tokenizer(text.rstrip()).split()
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"model.bleu_tokenize: {kind} needs what is not here ({' '.join(str(error).split())[:120]}). "
            f"Run pip install {PACKAGES[kind]}, or choose 13a, zh or char."
        ) from error
