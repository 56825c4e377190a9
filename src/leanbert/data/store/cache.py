"""Folders of files that are made once, checked whenever they are opened, and made again where they are damaged.

All that is kept in `data.cache_dir` is made by `made_once`: token ids, examples, trained tokenizers, embedded samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leanbert.data.store.checksums import DigestMemory, file_digest, file_stamp, read_checked, with_digest
from leanbert.files import expand, explain_disk_errors, locked, remove_dead, replaced_folder
from leanbert.messages import say

INDEX = "meta.json"
"""The file with the folder's name, what is known of the other files, and their lengths and digests."""

Make = Callable[[Path], dict[str, Any] | None]
"""Fills the empty folder that it is given, and returns what is to be known of it: values that JSON has."""


def cache_folder(given: str | None) -> Path:
    """Return where all this is kept: the folder given as `data.cache_dir`, or the user's cache."""
    if given is not None:
        return expand(given, "data.cache_dir")
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "data.cache_dir") / "leanbert"


def made_once(folder: Path, make: Make) -> dict[str, Any]:
    """Return what is known of the files in `folder`, which `make` makes if they are not there or not whole.

    `folder` is `cache_dir / KIND / NAME`. One process makes it, the others wait. What is damaged is made again, and a
    line says so. Raises UserError: the disk is full or the folder cannot be written; and what `make` raises.
    """
    if not isinstance(found := _open(folder), str):
        return found
    with explain_disk_errors(folder.parent, "--data.cache_dir"):
        remove_dead(folder.parent)
        with locked(folder):
            if not isinstance(found := _open(folder), str):
                return found
            if found:
                say(f"{folder}: is damaged ({found}) and is made again")
            with replaced_folder(folder) as building:
                known = json.loads(json.dumps(make(building) or {}))  # the same now as when it is read
                files = {path.name: [path.stat().st_size, file_digest(path)] for path in sorted(building.iterdir())}
                index = {"folder": folder.name, "facts": known, "files": files}
                (building / INDEX).write_text(with_digest(index), encoding="utf-8")
    return dict(known)


def _open(folder: Path) -> dict[str, Any] | str:
    """Return what is known of the files; or what is damaged, "" where there is nothing."""
    if not os.path.lexists(folder):
        return ""
    try:
        index = read_checked(folder / INDEX)
        if index.get("folder") != folder.name:
            raise ValueError(f"{INDEX} is of another folder")
        memory = DigestMemory(folder.parent.parent)
        for name, (size, digest) in index["files"].items():
            if file_stamp(folder / name)[0] != size or memory.digest(folder / name) != digest:
                raise ValueError(f"{name} has changed")
        memory.save()
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    except (ValueError, RuntimeError) as error:  # RuntimeError: resolving a circle of links
        return str(error)
    return dict(index["facts"])
