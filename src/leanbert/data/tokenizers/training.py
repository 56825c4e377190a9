"""Train a tokenizer so that the same corpus gives the same bytes in any process.

The trainers of `tokenizers` walk hash maps whose order differs between processes. What that touches is taken
out of their hands: WordPiece gets its alphabet sorted and complete before it starts; Unigram's scores are
rounded and its pieces sorted afterwards. Nor do they see endless words, in whose length they are quadratic.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from leanbert.data.tokenizers.classes import SPECIAL_TOKENS, add_bert_template, bert_pipeline
from leanbert.errors import UserError
from leanbert.messages import say

Kind = Literal["auto", "wordpiece", "bpe", "unigram"]

_SMALLEST = len(SPECIAL_TOKENS) + 8

LEAST = {"auto": _SMALLEST, "wordpiece": _SMALLEST, "bpe": len(SPECIAL_TOKENS) + 256, "unigram": _SMALLEST}
"""Smallest vocabularies: byte-level BPE begins with all bytes."""

UNSPACED_FRACTION = 0.1
"""From this fraction of characters in text without spaces on, "auto" is byte-level BPE."""

LONGEST_WORD = 1000
"""Longer runs without white space, or of nothing else, are cut when a tokenizer is trained."""

_LONGEST_OF_WORDPIECE = 100
"""A longer word is one unknown token to it."""

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # words of their own to BERT's pre-tokenizer
_UNSPACED_SCRIPTS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff"  # Thai, Lao, Burmese, Khmer, kana
_UNSPACED = re.compile(f"[{_UNSPACED_SCRIPTS}]")
_LONG_WORD = re.compile(rf"[^\W_{_CHINESE}{_UNSPACED_SCRIPTS}]{{{_LONGEST_OF_WORDPIECE + 1},}}")
_ENDLESS = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)|\s{{{LONGEST_WORD}}}(?=\s)")

ALPHABET_FRACTION = 0.5
"""Largest fraction of the vocabulary that single characters may take (Chinese would take all of it)."""

# Where tokens carry the space before a word, the mask takes it too, as it stands for such a token.
_SPACED_SPECIALS = [AddedToken(token, special=True, lstrip=token == "[MASK]") for token in SPECIAL_TOKENS]

_MISSING_CHARACTER_STEP = 1e-4
"""Unigram scores characters that lost their piece from the lowest score up in these steps, in random order."""


def train_tokenizer(
    texts: Callable[[], Iterable[str]],
    *,
    kind: Kind = "auto",
    vocab_size: int = 8192,
    lowercase: bool = True,
    strip_accents: bool | None = None,
) -> Tokenizer:
    """Train a tokenizer with special tokens [PAD] [UNK] [CLS] [SEP] [MASK] (ids 0 to 4) and BERT's template.

    `texts` is called once or twice and returns the texts, the same each time. "auto" is WordPiece, or byte-level BPE
    for text without spaces between words. `strip_accents` None: those that WordPiece lowercases, as in BERT.
    WordPiece and byte-level BPE are reproducible to the byte in any process. Unigram is where no two pieces tie to
    the last bit of their loss, which its trainer computes in random order. Raises `UserError` for a `vocab_size`
    that cannot hold the special tokens and an alphabet, and for an empty corpus.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if vocab_size < LEAST[kind]:
        raise UserError(f"data.vocab_size: {vocab_size} is too small for {kind}. Set at least {LEAST[kind]}")
    characters: Counter[str] = Counter()
    if kind in ("auto", "wordpiece"):
        characters, unspaced = _survey(_not_empty(texts()))
        if kind == "auto" and unspaced >= UNSPACED_FRACTION and vocab_size >= LEAST["bpe"]:
            kind = "bpe"
            say(
                f"tokenizer   {unspaced:.0%} of the text has no spaces between words: byte-level BPE is trained in "
                "place of WordPiece (data.tokenizer_kind)"
            )
    bounded = _bounded(_not_empty(texts()))
    if kind in ("bpe", "unigram"):
        train = _train_bpe if kind == "bpe" else _train_unigram
        tokenizer = train(bounded, vocab_size, lowercase, bool(strip_accents))
    else:
        pipeline = partial(bert_pipeline, lowercase=lowercase, strip_accents=strip_accents)
        tokenizer = _train_wordpiece(bounded, characters, vocab_size, pipeline)
    add_bert_template(tokenizer)
    return tokenizer


def sample_evenly(texts: Iterable[str], fraction: float) -> Iterator[str]:
    """Yield about `fraction` of the texts, spread evenly, always the same ones."""
    credit = 0.0
    for text in texts:
        credit += min(fraction, 1.0)
        if credit >= 1.0:
            credit -= 1.0
            yield text


def _survey(texts: Iterable[str]) -> tuple[Counter[str], float]:
    """Return how often each character occurs, and the fraction of them, white space aside, in text without spaces."""
    counts: Counter[str] = Counter()
    unspaced = 0
    for text in texts:
        counts.update(text)
        if _may_hold_run(text, _LONGEST_OF_WORDPIECE):
            unspaced += sum(len(word[0]) for word in _LONG_WORD.finditer(text))
    unspaced += sum(count for character, count in counts.items() if _UNSPACED.match(character))
    return counts, unspaced / max(1, sum(n for character, n in counts.items() if not character.isspace()))


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, those with endless words or white space in parts: training is quadratic in their length."""
    for text in texts:
        start = 0
        if _may_hold_run(text, LONGEST_WORD):
            for run in _ENDLESS.finditer(text):
                yield text[start : run.end()]
                start = run.end()
        yield text[start:]


def _may_hold_run(text: str, length: int) -> bool:
    """Tell, a few times as fast as searching it, whether `length` characters without white space may be in a text."""
    step = length // 2
    return any(len(text[at : at + step].split(None, 1)) < 2 for at in range(0, len(text) - step, step))


def _train_wordpiece(
    texts: Iterator[str], characters: Counter[str], vocab_size: int, pipeline: Callable[[Any], Tokenizer]
) -> Tokenizer:
    tokenizer = pipeline(models.WordPiece(unk_token="[UNK]"))
    alphabet = _alphabet(characters, tokenizer, int(vocab_size * ALPHABET_FRACTION))
    # The trainer numbers "##c" pieces as it meets them, in a random order, and breaks ties by number: given
    # as special tokens they are numbered here. Only the five real ones stay special.
    continuing = ["##" + character for character in alphabet if _joins(character, tokenizer)]
    given = [*SPECIAL_TOKENS, *alphabet, *continuing]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(given)),
        min_frequency=2,
        show_progress=False,
        special_tokens=given,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[:vocab_size])
    trained = pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"))
    trained.decoder = decoders.WordPiece()
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    return trained


def _train_bpe(texts: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    plain = (normalizers.NFD(), normalizers.StripAccents()) if strip_accents else ()
    tokenizer.normalizer = normalizers.Sequence(
        [*plain, normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=_SPACED_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterator[str], vocab_size: int, lowercase: bool, strip_accents: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    forms = (
        (normalizers.NFKD(), normalizers.StripAccents(), normalizers.NFC()) if strip_accents else (normalizers.NFKC(),)
    )
    case = [normalizers.Lowercase()] if lowercase else []
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), *forms, *case, normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=_SPACED_SPECIALS, unk_token="[UNK]"
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer.model = models.Unigram(_canonical(pieces), unk_id=1, byte_fallback=False)
    tokenizer.add_special_tokens(_SPACED_SPECIALS)
    return tokenizer


def _canonical(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return Unigram's pieces without what its random summation order left: the last bits and the order."""
    special, learned = pieces[: len(SPECIAL_TOKENS)], pieces[len(SPECIAL_TOKENS) :]
    lowest = min(score for _, score in learned)
    singles = sum(len(piece) == 1 for piece, _ in learned)
    floor = lowest + _MISSING_CHARACTER_STEP * singles

    def settled(piece: str, score: float) -> float:
        return round(lowest if len(piece) == 1 and score <= floor else score, 6)

    rounded = [(piece, settled(piece, score)) for piece, score in learned]
    return [*special, *sorted(rounded, key=lambda item: (-item[1], item[0]))]


def _alphabet(characters: Counter[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """Return the most frequent normalised characters, at most `limit`, sorted."""
    normalised: Counter[str] = Counter()
    for character, count in characters.items():
        for result in tokenizer.normalizer.normalize_str(character).strip():
            normalised[result] += count
    kept = sorted(normalised, key=lambda character: (-normalised[character], character))[:limit]
    return sorted(kept)


def _joins(character: str, tokenizer: Tokenizer) -> bool:
    """Tell whether the character can stand inside a word; punctuation and Chinese characters cannot."""
    text: str = tokenizer.normalizer.normalize_str("a" + character)
    words: list[Any] = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return bool(words) and len(words[-1][0]) > 1


def _not_empty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise UserError("data.train_files: the corpus is empty, no tokenizer to train. Give files with text")
