"""Digests of files, remembered as long as nothing writes to these, and files that carry their own digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

from leanbert.files import locked, temporary

_SETTLED_NS = 2 * 10**9
"""A file changed more recently than this could change again unseen: file systems tick coarsely."""


class DigestMemory:
    """Digests of files, in a file by path: [stamp, digest]. Where that is damaged, or gone, it is begun anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[Any]] = read_checked(path)
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
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the BLAKE2b digest of a value that JSON has, in hex: a name for what it decides."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def with_digest(value: dict[str, Any]) -> str:
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
