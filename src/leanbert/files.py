"""Files that are written whole or not at all, and full disks said in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from leanbert import signals
from leanbert.errors import UserError
from leanbert.messages import say

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}

QUIET_SECONDS = 1.5
"""Whoever waits longer than this for another process is told so."""

REST = "rest.ckpt"
"""What is no shard, in the folder of a checkpoint in shards (see `shard_files`)."""

_TEMPORARY = re.compile(r"\.(.+)\.tmp-[0-9a-f]{8}")
"""Names of what is being written, and is renamed when it is whole."""


def expand(path: str | Path, setting: str) -> Path:
    """Return the path with `~` and `~user` replaced. Raises `UserError` if it is empty or there is no such user."""
    if not str(path):
        raise UserError(f"{setting}: is empty. Give a path, or leave it out")
    if "\0" in str(path):
        raise UserError(f"{setting}: {str(path)!r} is not a path. Give one without a zero byte")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        if os.path.lexists(path):  # a name may begin so
            return Path(path)
        raise UserError(f"{setting}: {path}: there is no such user. Give the path in full") from error


@contextmanager
def explain_disk_errors(folder: Path, setting: str | None = None) -> Iterator[None]:
    """Turn what the system says while writing below `folder` into a `UserError`; `setting` chooses another folder.

    Errors about other files, such as those that are read meanwhile, pass.
    """
    try:
        yield
    except OSError as error:
        choice = f" with {setting}" if setting else ""
        if error.errno in DISK_FULL:
            raise UserError(
                f"{folder}: the disk is full ({error.strerror}), nothing half-written was kept. "
                f"Free some space, or choose another disk{choice}"
            ) from error
        if _is_about(error, folder):
            raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another folder{choice}") from error
        raise


def _is_about(error: OSError, folder: Path) -> bool:
    if not isinstance(error.filename, str):  # as where writing to an open file fails
        return error.errno in FORBIDDEN
    named, folder = Path(error.filename).absolute(), folder.absolute()
    return named.is_relative_to(folder) or folder.is_relative_to(named)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`: one process makes it, the others wait; what a killed one left of it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock(target)
    try:
        lock.acquire(timeout=QUIET_SECONDS)
    except Timeout:
        say(f"Waiting for another process that makes {target}")
        lock.acquire()
    try:
        remove_leftovers(target.parent, target.name)
        yield
    finally:
        lock.release()


def _lock(target: Path) -> FileLock:
    return FileLock(f"{target}.lock")


@contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """Yield a new name beside `target` for what is to be renamed to it; nothing is left there, however this ends."""
    path = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    with _registered(path):
        yield path


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder of this process alone, which is gone afterwards, also when a signal ends the program."""
    path = Path(tempfile.mkdtemp(prefix="leanbert-"))
    with _registered(path):
        yield path


@contextmanager
def _registered(path: Path) -> Iterator[None]:
    signals.temporary.add(str(path.absolute()))
    try:
        yield
    finally:
        signals.remove(path)
        signals.temporary.discard(str(path.absolute()))


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder`, of `name` or of all names.

    Call it where nobody else can be writing these: under the lock of the folder, or of `name`.
    """
    for path, target in _half_written(folder):
        if name in (None, target.name):
            signals.remove(path)


def remove_dead(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`, and nothing of which a live one holds the lock."""
    for path, target in _half_written(folder):
        with contextlib.suppress(Timeout), _lock(target).acquire(timeout=0):
            signals.remove(path)


def _half_written(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield what is being, or was, written in `folder`, and what it was to be."""
    for path in list(folder.iterdir()) if os.path.isdir(folder) else ():
        if match := _TEMPORARY.fullmatch(path.name):
            yield path, folder / match[1]


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    Call it under `locked(target)`. A `target` that is there gets the new files one by one, so that a process that reads
    the old ones is at no moment without.
    """
    with temporary(target) as building:
        building.mkdir(parents=True)
        yield building
        for path in building.iterdir():
            _flush_to_disk(path)
        _put_in_place(building, target)


def _put_in_place(building: Path, target: Path) -> None:
    if target.is_symlink() or not target.is_dir():
        target.unlink(missing_ok=True)
    try:
        os.replace(building, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    for path in building.iterdir():
        place = target / path.name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        os.replace(path, place)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to a temporary file and rename it to `path`; what is no regular file is written through."""
    with explain_disk_errors(path.parent):
        if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout: a rename would replace it
            path.write_text(text, encoding="utf-8", newline="\n")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as building:
            building.write_text(text, encoding="utf-8", newline="\n")
            _flush_to_disk(building)
            os.replace(building, path)


def _flush_to_disk(path: Path) -> None:
    # A rename can reach the disk before the data: after a power cut a whole-looking file would be empty.
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
