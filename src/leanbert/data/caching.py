"""Tokenizers and caches of a data module, under names that follow whatever decides what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanbert.data.store.cache import cache_folder, made_once
from leanbert.data.store.checksums import corpus_digest, digest_of
from leanbert.data.store.examples import ExampleCache, build_examples
from leanbert.data.tokenizers.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from leanbert.data.module import RowData
    from leanbert.data.settings import Part

TRAINING_FORMAT = 3
"""Part of a trained tokenizer's key: raise it when training changes."""


def trained_tokenizer(
    data: RowData, texts: Callable[[], Iterable[str]], *which: str, vocab_size: int | None = None
) -> TextTokenizer:
    """Return a tokenizer trained on texts of the training files; `which` tells those that are not all of them."""
    chosen = {name: data.hparams[name] for name in ("vocab_size", "lowercase", "strip_accents")}
    chosen |= {"kind": data.hparams["tokenizer_kind"], "vocab_size": vocab_size or chosen["vocab_size"]}
    key = [TRAINING_FORMAT, version("tokenizers"), _reading(data, "train"), *which, chosen]
    folder = cache_folder(data.hparams["cache_dir"]) / "tokenizers" / digest_of(key)

    def make(building: Path) -> None:
        text = TextTokenizer.train(texts, **chosen).to_json()
        (building / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")

    made_once(folder, make)
    return TextTokenizer.from_file(folder / "tokenizer.json")


def examples_of(data: RowData, part: Part) -> ExampleCache:
    """Return the cache of the examples of a part, building it if it is not there."""
    tokenizers = [tokenizer.to_json() for tokenizer in data.tokenizers.values()]
    shape = [data.hparams[name] for name in data.shaped_by]
    sizes = {column: tokenizer.vocab_size for column, tokenizer in data.columns.items()}
    dtypes = {column: "uint16" if size <= 1 << 16 else "uint32" for column, size in sizes.items()}
    return build_examples(
        [_reading(data, part), tokenizers, shape],
        {**dtypes, **data.other_columns},
        sizes,
        lambda notes: data.encode(part, notes),
        cache_folder(data.hparams["cache_dir"]),
        f"data.{part}_files: {data.nothing}",
    )


def _reading(data: RowData, part: Part) -> list[Any]:
    """Return what decides the texts of a part: contents of the files, and how they are read."""
    digest = corpus_digest(data.corpus(part), cache_folder(data.hparams["cache_dir"]))
    return [type(data).__name__, digest, *data.held_out(part), data.key(part)]
