"""Digests of files and corpora, remembered as long as nothing writes to these, and files with their own digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leanbert.data.formats.columns import open_dataset, split_dataset_spec
from leanbert.data.formats.corpora import Corpus
from leanbert.errors import UserError
from leanbert.files import locked, temporary

MEMORY = "digests.json"
"""The file in `data.cache_dir` by which a file is not read again, to check it, while nothing writes to it."""

_SETTLED_NS = 2 * 10**9
"""A file changed more recently than this could change again unseen: file systems tick coarsely."""


class DigestMemory:
    """Digests of files, in `cache_dir / MEMORY` by path: [stamp, digest]. Where that is damaged it is begun anew."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / MEMORY
        try:
            self._known: dict[str, list[Any]] = read_checked(self._path)
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def digest(self, path: Path) -> str:
        """Return the digest of a file, which is read if it may have changed. Raises OSError, and ValueError if none."""
        path = path.resolve()
        stamp = file_stamp(path)
        known = self._known.get(str(path))
        if known and known[0] == stamp:
            return str(known[1])
        digest = file_digest(path)
        if time.time_ns() - max(stamp[1:3]) > _SETTLED_NS:
            self._known[str(path)] = [stamp, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Keep what is new, where that is possible: without it, files are only read once more."""
        if self._changed:
            with contextlib.suppress(OSError), locked(self._path), temporary(self._path) as building:
                building.write_text(with_digest(self._known), encoding="utf-8")
                os.replace(building, self._path)  # also where there is a pipe, or a link to somewhere


def corpus_digest(corpus: Corpus, cache_dir: Path) -> str:
    """Return a digest of what the corpus' files hold and of their formats, whatever they are called.

    Raises `UserError` if one cannot be read.
    """
    memory = DigestMemory(cache_dir)

    def digest(path: Path) -> str:
        try:
            return memory.digest(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its rights") from error

    parts = [["".join(path.suffixes[-2:]), digest(path)] for path in corpus.files]
    for spec in corpus.datasets:
        files = [Path(file["filename"]) for file in open_dataset(spec).cache_files]
        parts.append([split_dataset_spec(spec).split, *map(digest, files)])
    memory.save()
    return digest_of(parts)


def file_stamp(path: Path) -> list[int]:
    """Return what changes when a file is written: size in bytes, times of change in ns, number on the disk.

    Raises OSError if there is nothing, ValueError if it is no regular file.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise ValueError(f"{path.name} is no file")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def file_digest(path: Path) -> str:
    """Return the BLAKE2b digest of a file's bytes, in hex. Raises OSError if it cannot be read."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def files_digests(source: Path, digest: Callable[[Path], str] = file_digest) -> list[str]:
    """Return the digests of a file, or of all files of a folder in the order of their names, as a model's."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [digest(file) for file in files if file.is_file()]


def digest_of(value: object) -> str:
    """Return the BLAKE2b digest of a value that JSON has, in hex: a name for what it decides."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def with_digest(value: Mapping[str, object]) -> str:
    """Return a value that JSON has as a text that `read_checked` knows again."""
    return json.dumps({**value, "digest": digest_of(value)})


def read_checked(path: Path) -> dict[str, Any]:
    """Return the value in a file of `with_digest`. Raises OSError, or ValueError if it is not what was written."""
    file_stamp(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or value.pop("digest", None) != digest_of(value):
        raise ValueError(f"{path.name} has changed")
    return value
