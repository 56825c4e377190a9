"""Files that are written whole or not at all, and full disks said in one line."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from leanbert.errors import UserError

DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


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
    """Hold the lock file beside `target`: one process builds, the others wait."""
    with explain_disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    Call it under `locked(target)`: the leftovers of a killed process are removed first.
    """
    for stale in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    building = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with explain_disk_errors(target.parent):
            building.mkdir(parents=True)
            yield building
            for path in building.iterdir():
                _flush_to_disk(path)
            os.replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to a temporary file and rename it to `path`."""
    building = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with explain_disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            building.write_text(text, encoding="utf-8", newline="\n")
            _flush_to_disk(building)
            os.replace(building, path)
    finally:
        building.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    # A rename can reach the disk before the data: after a power cut a whole-looking file would be empty.
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
