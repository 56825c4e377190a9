"""The token cache: a corpus as one file of ids, keyed by content and tokenizer, built once and whole."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tqdm import tqdm

from leanbert.data.formats.corpora import EmptyCorpusError, Piece, Split
from leanbert.data.store.cache import made_once
from leanbert.data.store.checksums import digest_of
from leanbert.data.tokenizers.tokenizer import TextTokenizer

FORMAT = 2
"""Part of the key: raise it when files or encoding change."""

BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once: enough to keep all cores busy, little enough to forget."""

BATCHES_IN_FLIGHT = 3
"""One is encoded in Rust while another's ids become an array and a third is read."""

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class TokenCache:
    """Documents as ids, each in the tokenizer's template, one after the other, on disk.

    `ids.bin` holds `tokens` ids of `dtype` (uint16 or uint32), `offsets.bin` the `documents + 1` int64 places
    where documents begin, and the end; `counts.bin` int64 [V] how often each id occurs. Files are mapped for
    each read and let go after it, so that resident memory does not grow with what was read; the object
    itself pickles as a path and a few numbers.
    """

    folder: Path
    documents: int
    tokens: int
    dtype: str
    vocab_size: int

    @cached_property
    def unigram_counts(self) -> np.ndarray:
        """How often each id occurs: int64 [V]."""
        return np.fromfile(self.folder / "counts.bin", dtype=np.int64)

    def ids(self) -> np.ndarray:
        """Map the ids: `dtype` [tokens], read-only."""
        return map_file(self.folder / "ids.bin", self.dtype)

    def offsets(self) -> np.ndarray:
        """Map the places where documents begin, and the end: int64 [documents + 1], read-only."""
        return map_file(self.folder / "offsets.bin", "int64")


def build_cache(split: Split, content: str, tokenizer: TextTokenizer, cache_dir: Path, label: str) -> TokenCache:
    """Return the token cache of a part of a corpus, building it if it is not there.

    `content` is the digest of the corpus' files; with the parse settings, the tokenizer and the format it
    makes the folder's name. Another process that builds the same waits; one that was killed leaves nothing
    that is taken for whole. Raises `UserError` for an empty part, a full disk, and input that cannot be read.
    """
    folder = cache_dir / "tokens" / _key(split, content, tokenizer)

    def make(building: Path) -> dict[str, Any]:
        with progress_bar(split, label) as bar:
            facts = _write(building, split.pieces(bar.update), tokenizer)
        if facts["documents"] == 0:
            raise EmptyCorpusError(f"{split.corpus.setting}: the corpus is empty. Give files with text")
        return facts

    return TokenCache(folder, **made_once(folder, make))


def _key(split: Split, content: str, tokenizer: TextTokenizer) -> str:
    corpus = split.corpus
    reading = [content, corpus.text_field, corpus.separator, split.low, split.high]
    return digest_of([FORMAT, tokenizers.__version__, reading, tokenizer.to_json()])


def progress_bar(split: Split, label: str) -> tqdm:
    """Return a bar of bytes read from disk, on standard error; silent where that is no terminal."""
    total = split.corpus.size_bytes
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None, leave=False)


def _write(folder: Path, pieces: Iterable[Piece], tokenizer: TextTokenizer) -> dict[str, Any]:
    """Write the files of a cache and return the facts about it."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    documents = tokens = 0

    def encode(batch: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        return encode_pieces(batch, tokenizer, dtype)

    with (folder / "ids.bin").open("wb") as ids_file, (folder / "offsets.bin").open("wb") as offsets_file:
        for ids, starts in _map_in_order(encode, _batches(pieces)):
            ids_file.write(ids.data)
            offsets_file.write((starts + tokens).data)
            counts += np.bincount(ids, minlength=len(counts))
            documents += len(starts)
            tokens += len(ids)
        offsets_file.write(np.int64(tokens).tobytes())
    (folder / "counts.bin").write_bytes(counts.data)
    return {"documents": documents, "tokens": tokens, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size}


def encode_pieces(pieces: list[Piece], tokenizer: TextTokenizer, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the pieces, with the template around documents, and where documents begin (int64)."""
    before, after = tokenizer.template
    encoded = tokenizer.encode_bare([piece.text for piece in pieces])
    flat: list[int] = []
    starts: list[int] = []
    for piece, ids in zip(pieces, encoded, strict=True):
        if piece.begins:
            starts.append(len(flat))
            flat += before
        flat += ids
        if piece.ends:
            flat += after
    return np.asarray(flat, dtype=dtype), np.asarray(starts, dtype=np.int64)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map_in_order(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """Map in threads (the tokenizer's Rust code runs outside Python's lock), few at a time, in order."""
    waiting: deque[Future[Out]] = deque()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= BATCHES_IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def map_file(path: Path, dtype: str) -> np.ndarray:
    """Map a file of numbers, read-only, until the array is let go."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    with path.open("rb") as handle:
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
