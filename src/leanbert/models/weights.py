"""Weights from disk, read so that no file can run code."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from leanbert.errors import UserError
from leanbert.models.config import EncoderConfig, ResolvedConfig

StateDict = dict[str, Tensor]

MODEL_PREFIX = "model."
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


class Stored(NamedTuple):
    """A model on disk: the encoder's settings, the weights by our names, its task, and what else it is made of.

    `facts` are primitives: those that data module and task keep (labels, the decoder's layers), and "max_length", the
    tokens of the rows that it was trained on. Each may be absent.
    """

    config: ResolvedConfig
    state: StateDict
    task: str
    facts: dict[str, Any]


def read_folder(folder: Path) -> StateDict:
    """Read all weights of a Hugging Face folder, one file or sharded, on the CPU in their stored dtype.

    Raises `UserError` if there is none, or one is damaged or carries code.
    """
    for name in FOLDER_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_file(folder / name)
        if index.is_file():
            return _read_shards(index)
    raise UserError(f"{folder}: no {' or '.join(FOLDER_FILES)} in it. Save the model there first")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `UserError` naming file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Name a folder saved by save_pretrained or by export") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON ({error.msg}). Copy the file again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: not a JSON object. Copy the file again")
    return value


def read_checkpoint(path: Path) -> Stored:
    """Read a LeanBERT checkpoint; tensors stay mapped to the file.

    Raises `UserError` if it is missing, damaged, carries code, or is not of LeanBERT.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint or folder. Correct model.init_from")
    fix = "Use another checkpoint of the run."
    stored = unpack(load_pickled(path, fix), path)
    check_sums(path, fix)
    return stored


def unpack(checkpoint: Any, path: Path) -> Stored:
    """Return the model in a checkpoint read from `path`. Raises `UserError` if it is not of LeanBERT."""
    try:
        kept = checkpoint["leanbert"]
        config = EncoderConfig(**kept["encoder"]).resolved()
        weights = checkpoint["state_dict"]
        length = {"max_length": kept["max_length"]} if "max_length" in kept else {}
        facts = {**length, **kept.get("data", {}), **kept.get("model", {})}
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a LeanBERT checkpoint. Name a .ckpt of a run, or a folder") from None
    prefix = MODEL_PREFIX
    state = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    return Stored(config, state, kept.get("task", "mlm"), facts)


def load_pickled(path: Path, fix: str) -> Any:
    """`torch.load` on the CPU, with primitives and tensors only; large files are mapped, not copied.

    Raises `UserError`, ending with `fix`, if the file is damaged or carries code, which is not run.
    """
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


def _read_file(path: Path) -> StateDict:
    if path.suffix != ".safetensors":
        state = load_pickled(path, "Ask for a .safetensors file.")
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise UserError(f"{path}: not a table of tensors. Save it with save_pretrained")
        return state
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}). Copy the file again") from None


def _read_shards(index: Path) -> StateDict:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{index}:1: no weight_map. Save the model again")
    state: StateDict = {}
    for name in sorted(set(shards.values())):
        # Only the last part of the name counts: an index must not reach out of its folder.
        path = index.parent / Path(name).name
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {index.name} lists it. Copy it too")
        state |= _read_file(path)
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
