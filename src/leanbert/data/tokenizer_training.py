"""Train a tokenizer so that the same corpus gives the same bytes in any process.

The trainers of `tokenizers` walk hash maps whose order differs between processes. What that touches is taken
out of their hands: WordPiece gets its alphabet sorted and complete before it starts; Unigram's scores are
rounded and its pieces sorted afterwards.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from leanbert.data.sources import EmptyCorpusError
from leanbert.data.tokenizer_classes import SPECIAL_TOKENS, add_bert_template, bert_pipeline
from leanbert.errors import UserError

Kind = Literal["wordpiece", "bpe", "unigram"]

ALPHABET_SHARE = 0.5
"""Largest share of the vocabulary that single characters may take (Chinese would take all of it)."""

# Where tokens carry the space before a word, the mask takes it too, as it stands for such a token.
_SPACED_SPECIALS = [AddedToken(token, special=True, lstrip=token == "[MASK]") for token in SPECIAL_TOKENS]

_MISSING_CHARACTER_STEP = 1e-4
"""Unigram scores characters that lost their piece from the lowest score up in these steps, in random order."""


def train_tokenizer(
    texts: Callable[[], Iterable[str]],
    *,
    kind: Kind = "wordpiece",
    vocab_size: int = 8192,
    lowercase: bool = True,
) -> Tokenizer:
    """Train a tokenizer with special tokens [PAD] [UNK] [CLS] [SEP] [MASK] (ids 0 to 4) and BERT's template.

    `texts` is called once or twice and returns the texts, the same each time. WordPiece and byte-level BPE are
    reproducible to the byte in any process. Unigram is where no two pieces tie to the last bit of their loss,
    which its trainer computes in random order. Raises `UserError` for a `vocab_size` that cannot hold the
    special tokens and an alphabet, and for an empty corpus.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "bpe" else 8)
    if vocab_size < smallest:
        raise UserError(f"data.vocab_size: {vocab_size} is too small for {kind}. Set at least {smallest}")
    tokenizer = {"wordpiece": _train_wordpiece, "bpe": _train_bpe, "unigram": _train_unigram}[kind](
        texts, vocab_size, lowercase
    )
    add_bert_template(tokenizer)
    return tokenizer


def sample_evenly(texts: Iterable[str], share: float) -> Iterator[str]:
    """Yield about `share` of the texts, spread evenly, always the same ones."""
    credit = 0.0
    for text in texts:
        credit += min(share, 1.0)
        if credit >= 1.0:
            credit -= 1.0
            yield text


def _train_wordpiece(texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = bert_pipeline(models.WordPiece(unk_token="[UNK]"), lowercase)
    alphabet = _alphabet(texts(), tokenizer, int(vocab_size * ALPHABET_SHARE))
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
    tokenizer.train_from_iterator(texts(), trainer)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])[:vocab_size])
    trained = bert_pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"), lowercase)
    trained.decoder = decoders.WordPiece()
    trained.add_special_tokens(list(SPECIAL_TOKENS))
    return trained


def _train_bpe(texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=_SPACED_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_not_empty(texts()), trainer)
    return tokenizer


def _train_unigram(texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.NFKC(),
            *([normalizers.Lowercase()] if lowercase else []),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, show_progress=False, special_tokens=_SPACED_SPECIALS, unk_token="[UNK]"
    )
    tokenizer.train_from_iterator(_not_empty(texts()), trainer)
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


def _alphabet(texts: Iterable[str], tokenizer: Tokenizer, limit: int) -> list[str]:
    """Return the most frequent normalised characters, at most `limit`, sorted."""
    counts: Counter[str] = Counter()
    for text in _not_empty(texts):
        counts.update(text)
    normalised: Counter[str] = Counter()
    for character, count in counts.items():
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
        raise EmptyCorpusError("data.train_files: the corpus is empty, no tokenizer to train. Give files with text")
