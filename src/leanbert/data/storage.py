"""Files that are written whole or not at all, and full disks said in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from leanbert import signals
from leanbert.errors import UserError

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


@contextmanager
def explain_disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" and "permission denied" while writing below `folder` into a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(
                f"{folder}: the disk is full ({error.strerror}), nothing half-written was kept. "
                "Free some space, or choose another disk with --data.cache_dir"
            ) from error
        if error.errno in FORBIDDEN:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}). Choose another folder with --data.cache_dir"
            ) from error
        raise


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock file beside `target`: one builds, the others wait; what a killed process left half-built goes."""
    with explain_disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    try:
        remove_leftovers(target.parent, target.name)
        yield
    finally:
        lock.release()


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
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.tmp-[0-9a-f]{{8}}")
    if folder.is_dir():
        for path in folder.iterdir():
            if pattern.fullmatch(path.name):
                signals.remove(path)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    Call it under `locked(target)`.
    """
    shutil.rmtree(target, ignore_errors=True)
    with temporary(target) as building, explain_disk_errors(target.parent):
        building.mkdir(parents=True)
        yield building
        for path in building.iterdir():
            _flush_to_disk(path)
        os.replace(building, target)


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
