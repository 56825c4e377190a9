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
"""The file with the folder's name, the facts, and length and digest of the other files."""

MEMORY = "digests.json"
"""The file in `data.cache_dir` by which a file is not read again, to check it, while nothing writes to it."""

Make = Callable[[Path], dict[str, Any]]
"""Fills the empty folder that it is given, and returns facts: values that JSON has."""


def cache_folder(given: str | None) -> Path:
    """Return where all this is kept: the folder given as `data.cache_dir`, or the user's cache."""
    if given is not None:
        return expand(given, "data.cache_dir")
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "data.cache_dir") / "leanbert"


def made_once(folder: Path, make: Make) -> dict[str, Any]:
    """Return the facts that are kept with the files in `folder`, which `make` makes if they are not there or not whole.

    `folder` is `cache_dir / KIND / NAME`. One process makes it, the others wait. What is damaged is made again, and a
    line says so.

    Raises:
        UserError: The disk is full or the folder cannot be written; and what `make` raises.

    """
    facts, _ = _open(folder)
    if facts is not None:
        return facts
    with explain_disk_errors(folder.parent, "--data.cache_dir"):
        remove_dead(folder.parent)
        with locked(folder):
            facts, damage = _open(folder)
            if facts is not None:
                return facts
            if damage is not None:
                say(f"{folder}: is damaged ({damage}) and is made again")
            with replaced_folder(folder) as building:
                facts = json.loads(json.dumps(make(building)))  # the same now as when they are read
                files = {path.name: [path.stat().st_size, file_digest(path)] for path in sorted(building.iterdir())}
                index = {"folder": folder.name, "facts": facts, "files": files}
                (building / INDEX).write_text(with_digest(index), encoding="utf-8")
    return dict(facts)


def _open(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return the facts, and None; or None, and what is damaged; or twice None where there is nothing."""
    if not os.path.lexists(folder):
        return None, None
    try:
        index = read_checked(folder / INDEX)
        if index.get("folder") != folder.name:
            raise ValueError(f"{INDEX} is of another folder")
        memory = DigestMemory(folder.parent.parent / MEMORY)
        for name, (size, digest) in index["files"].items():
            if file_stamp(folder / name)[0] != size or memory.digest(folder / name) != digest:
                raise ValueError(f"{name} has changed")
        memory.save()
    except OSError as error:
        return None, f"{Path(error.filename or folder).name}: {error.strerror or error}"
    except (ValueError, RuntimeError) as error:  # RuntimeError: resolving a circle of links
        return None, str(error)
    return dict(index["facts"]), None
