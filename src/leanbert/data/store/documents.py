"""The documents of a corpus as examples of one column, "ids": each in the tokenizer's template, long ones in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tqdm import tqdm

from leanbert.data.formats.corpora import Corpus
from leanbert.data.formats.documents import Piece
from leanbert.data.store.examples import Example, Unfinished
from leanbert.data.tokenizers.tokenizer import TextTokenizer

BATCH_CHARACTERS = 1 << 20
"""Text that is encoded at once: enough to keep all cores busy, little enough to forget."""

BATCHES_IN_FLIGHT = 3
"""One is encoded in Rust while another's ids are written and a third is read."""


def encode_documents(pieces: Iterable[Piece], tokenizer: TextTokenizer) -> Iterator[Example]:
    """Yield the documents; they are encoded in threads, for the tokenizer's Rust code runs outside Python's lock."""
    waiting: deque[Future[list[Example]]] = deque()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for batch in _batches(pieces):
            waiting.append(pool.submit(encode_pieces, batch, tokenizer))
            if len(waiting) >= BATCHES_IN_FLIGHT:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def encode_pieces(pieces: list[Piece], tokenizer: TextTokenizer) -> list[Example]:
    """Return the ids of the pieces, with the template around documents."""
    before, after = tokenizer.template
    found: list[Example] = []
    for piece, ids in zip(pieces, tokenizer.encode_bare([piece.text for piece in pieces]), strict=True):
        whole = [*(before if piece.begins else ()), *ids, *(after if piece.ends else ())]
        found.append({"ids": whole} if piece.ends else Unfinished(ids=whole))
    return found


def progress_bar(corpus: Corpus, label: str) -> tqdm:
    """Return a bar of bytes read from disk, on standard error; silent where that is no terminal."""
    return tqdm(total=corpus.size_bytes, desc=label, unit="B", unit_scale=True, disable=None, leave=False)


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
