"""Digests of corpus contents, remembered by path, size and time of change."""

from __future__ import annotations

from pathlib import Path

from leanbert.data.formats.columns import open_dataset, split_dataset_spec
from leanbert.data.formats.corpora import Corpus
from leanbert.data.store.cache import MEMORY
from leanbert.data.store.checksums import DigestMemory, digest_of
from leanbert.errors import UserError


def corpus_digest(corpus: Corpus, cache_dir: Path) -> str:
    """Return a digest of what the corpus' files hold and of their formats, whatever they are called.

    Raises `UserError` if one cannot be read.
    """
    memory = DigestMemory(cache_dir / MEMORY)
    facts = [[_format(path.name), _digest(path, memory)] for path in corpus.files]
    for spec in corpus.datasets:
        dataset = open_dataset(spec)
        files = [Path(file["filename"]) for file in dataset.cache_files]
        facts.append([split_dataset_spec(spec).split, *(_digest(path, memory) for path in files)])
    memory.save()
    return digest_of(facts)


def _digest(path: Path, memory: DigestMemory) -> str:
    try:
        return memory.digest(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights") from error


def _format(name: str) -> str:
    return "".join(Path(name).suffixes[-2:])
