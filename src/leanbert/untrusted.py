"""Files from elsewhere, read so that none can execute code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from leanbert.errors import UserError, first_line

LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for another one, in a repository that was cloned without git-lfs."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `UserError` naming file and line."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Name a folder saved by save_pretrained or by export") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}). Copy the file again") from None
    except (OSError, ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise UserError(f"{path}: cannot be read ({first_line(error)}). Copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: not a JSON object. Copy the file again")
    return value


def refuse_pointer(path: Path) -> None:
    """Raise `UserError` if git-lfs has left a pointer in place of a file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS))
    except OSError:
        return  # said by whoever reads it
    if start == LFS:
        raise UserError(f"{path}: a git-lfs pointer, not the file. Run git lfs pull in its folder")


def load_pickled(path: Path, fix: str) -> Any:
    """`torch.load` on the CPU, with primitives and tensors only; large files are mapped, not copied.

    Raises `UserError`, ending with `fix`, if the file is damaged or carries code, which is not run.
    """
    refuse_pointer(path)
    is_archive = False
    try:
        with path.open("rb") as file:
            is_archive = file.read(4) == b"PK\3\4"
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception as error:  # flipped bits raise anything: zlib.error, struct.error, MemoryError, KeyError
        if is_archive and isinstance(error, pickle.UnpicklingError):
            raise UserError(
                f"{path}: holds Python objects other than tensors and plain values, which could execute code; "
                f"refused. {fix}"
            ) from error
        raise UserError(f"{path}: damaged, or no file that torch.save wrote. {fix}") from error


def check_sums(path: Path, fix: str) -> None:
    """Compare every record of a file that torch.save wrote with its checksum, a piece at a time.

    Raises `UserError`, ending with `fix`, if one differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise UserError(f"{path}: damaged, or no file that torch.save wrote. {fix}") from error
    if damaged is not None:
        raise UserError(f"{path}: damaged ({damaged}). {fix}")
