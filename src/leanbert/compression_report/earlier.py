"""Files of variants that an earlier `compress` has left in the same folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from leanbert.compression_report.report import JSON, Row
from leanbert.errors import UserError


def listed_files(output: Path, source: Path) -> list[Path]:
    """Return the files of variants that the report in the folder `output` lists, none outside of it.

    Raises UserError: the report is not of `compress`, or `source`, the model to compress, is one of these variants.
    """
    report, inside = output / JSON, output.resolve()
    if not report.is_file():
        return []
    try:
        files = [(inside / name).resolve() for name in json.loads(report.read_bytes())["files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--output: {report} does not list files of variants. Choose another folder") from None
    if any(source.resolve() in (file, *file.parents) for file in files):
        raise UserError(f"--output: would replace {source}, the model to compress. Choose another folder")
    return [file for file in files if inside in file.parents]


def remove_files(output: Path, files: Sequence[Path]) -> set[Path]:
    """Remove files below `output`, and their folders where nothing else is in them; return what is left below it."""
    for file in files:
        file.unlink(missing_ok=True)
    folders = {folder for file in files for folder in list(file.parents)[:2]}
    for folder in sorted(folders, key=lambda each: -len(each.parts)):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
    return set(output.rglob("*"))


def files_of(output: Path, rows: Sequence[Row], others: set[Path]) -> list[str]:
    """Return the files in the folders of variants but for `others`, relative to `output`."""
    found = {file for row in rows for file in (output / row.name).rglob("*") if file.is_file()}
    return sorted(file.relative_to(output).as_posix() for file in found - others)
