"""Digests of corpus contents, remembered by path, size and time of change."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from leanbert.data.columns import open_dataset, split_dataset_spec
from leanbert.data.sources import Corpus
from leanbert.data.storage import write_text_atomically
from leanbert.errors import UserError

_SETTLED_SECONDS = 2.0
"""A file changed more recently than this could change again unseen: file systems tick coarsely."""


def corpus_digest(corpus: Corpus, cache_dir: Path) -> str:
    """Return a digest of what the corpus' files hold and of their formats, whatever they are called."""
    memory = _DigestMemory(cache_dir / "digests.json")
    facts = [[_format(path.name), memory.digest(path)] for path in corpus.files]
    for spec in corpus.datasets:
        dataset = open_dataset(spec)
        files = [Path(file["filename"]) for file in dataset.cache_files]
        facts.append([split_dataset_spec(spec).split, *(memory.digest(path) for path in files)])
    memory.save()
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


class _DigestMemory:
    """What was digested before: {path: [size in bytes, time of change in ns, digest]}."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def digest(self, path: Path) -> str:
        path = path.resolve()
        stat = path.stat()
        known = self._known.get(str(path))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        digest = file_digest(path)
        if time.time() - stat.st_mtime > _SETTLED_SECONDS:
            self._known[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        if self._changed:
            write_text_atomically(self._path, json.dumps(self._known))


def file_digest(path: Path) -> str:
    """Return the BLAKE2b digest of a file's bytes, in hex. Raises `UserError` if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights") from error
    return digest.hexdigest()


def _format(name: str) -> str:
    return "".join(Path(name).suffixes[-2:])
