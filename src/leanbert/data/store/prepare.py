"""Tokenizer and token caches of a training and a validation corpus, made once and found again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leanbert.data.formats.corpora import Corpus, EmptyCorpusError, Separator, Split, besides, document_hash
from leanbert.data.samples.docstrings import embedded_corpus
from leanbert.data.store.cache import made_once
from leanbert.data.store.checksums import digest_of
from leanbert.data.store.corpus_digest import corpus_digest
from leanbert.data.store.token_cache import TokenCache, build_cache, progress_bar
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.data.tokenizers.training import Kind, sample_evenly
from leanbert.errors import UserError
from leanbert.files import expand

TRAINING_FORMAT = 2
"""Part of a trained tokenizer's key: raise it when training changes."""

SAMPLE_BYTES = 256 << 20
"""A tokenizer is trained on about so much text, spread evenly over a larger corpus."""

COMPRESSION = 3
"""How much text a compressed byte stands for, about, when the share to sample is reckoned."""


@dataclass(frozen=True)
class Prepared:
    """What training needs of a corpus."""

    tokenizer: TextTokenizer
    train: TokenCache
    val: TokenCache


@dataclass(frozen=True)
class CorpusSettings:
    """The settings of `MaskedLMData` that decide what is prepared; the same names."""

    train_files: Sequence[str] | None = None
    val_files: Sequence[str] | None = None
    text_field: str = "text"
    document_separator: Separator = "blank_line"
    val_share: float = 0.02
    tokenizer: str | None = None
    tokenizer_kind: Kind = "auto"
    lowercase: bool = True
    strip_accents: bool | None = None
    vocab_size: int = 8192
    cache_dir: str | None = None

    def prepare(self) -> Prepared:
        """Make, or find, tokenizer and caches. Raises `UserError` for whatever is wrong with the input."""
        train, val = self._splits()
        content = corpus_digest(train.corpus, self.cache_folder)
        try:
            tokenizer = self._tokenizer(train, content)
            train_cache = build_cache(train, content, tokenizer, self.cache_folder, "Training text")
        except EmptyCorpusError as error:
            if train.whole:
                raise
            raise UserError(
                f"data.val_share: {self.val_share} leaves no document to train on. Give data.val_files"
            ) from error
        val_content = corpus_digest(val.corpus, self.cache_folder)
        val_cache = build_cache(val, val_content, tokenizer, self.cache_folder, "Validation text")
        return Prepared(tokenizer, train_cache, val_cache)

    def validation_texts(self) -> Iterator[str]:
        """Yield the validation documents as they were written, of a long one the first piece."""
        _, val = self._splits()
        return (piece.text for piece in val.pieces() if piece.begins)

    @cached_property
    def cache_folder(self) -> Path:
        """Where tokenizers and token caches are kept."""
        return cache_folder(self.cache_dir)

    def _corpus(self, files: Sequence[str] | None, setting: str) -> Corpus:
        if files is None:
            return Corpus((str(embedded_corpus(self.cache_folder)),), setting=setting)
        return Corpus(tuple(files), self.text_field, self.document_separator, setting)

    def _splits(self) -> tuple[Split, Split]:
        files = self.train_files
        if files is not None and self.val_files is not None:
            files = besides(files, "data.train_files", {"data.val_files": self.val_files})
        corpus = self._corpus(files, "data.train_files")
        if self.val_files is not None:
            return Split(corpus), Split(self._corpus(self.val_files, "data.val_files"))
        share = self.val_share
        lowest = _lowest_hash(corpus, share)
        if lowest >= share:
            share = lowest + 2.0**-48
        return Split(corpus, low=share), Split(corpus, high=share)

    def _tokenizer(self, train: Split, content: str) -> TextTokenizer:
        if self.tokenizer is not None:
            return TextTokenizer.from_file(self.tokenizer)
        share = SAMPLE_BYTES / max(1, _text_bytes(train.corpus))

        def texts() -> Iterator[str]:
            with progress_bar(train, "Tokenizer") as bar:
                yield from sample_evenly((piece.text for piece in train.pieces(bar.update)), share)

        facts = [content, self.text_field, self.document_separator, train.low]
        return trained_tokenizer(self.cache_folder, facts, texts, asdict(self))


def cache_folder(given: str | None) -> Path:
    """Return where tokenizers and caches are kept: the folder given, or the user's cache."""
    if given is not None:
        return expand(given, "data.cache_dir")
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "data.cache_dir") / "leanbert"


def trained_tokenizer(
    folder: Path, facts: list[Any], texts: Callable[[], Iterable[str]], settings: Mapping[str, Any]
) -> TextTokenizer:
    """Return the tokenizer trained on `texts()` by the data's `settings`, from below `folder` if it is there.

    `facts` tell which texts.
    """
    chosen = {name: settings[name] for name in ("vocab_size", "lowercase", "strip_accents")}
    chosen["kind"] = settings["tokenizer_kind"]
    kept = folder / "tokenizers" / digest_of([TRAINING_FORMAT, version("tokenizers"), *facts, chosen])

    def make(building: Path) -> dict[str, Any]:
        text = TextTokenizer.train(texts, **chosen).to_json()
        (building / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
        return {}

    made_once(kept, make)
    return TextTokenizer.from_file(kept / "tokenizer.json")


def _lowest_hash(corpus: Corpus, enough: float) -> float:
    """Return the lowest document hash of a corpus, or the first that is below `enough`."""
    lowest = 1.0
    for piece in corpus.pieces():
        if piece.begins:
            lowest = min(lowest, document_hash(piece.text))
            if lowest < enough:
                break
    if lowest == 1.0:
        raise EmptyCorpusError(f"{corpus.setting}: the corpus is empty. Give files with text")
    return lowest


def _text_bytes(corpus: Corpus) -> int:
    packed = {".gz", ".parquet"}
    return sum(path.stat().st_size * (COMPRESSION if path.suffix in packed else 1) for path in corpus.files)
