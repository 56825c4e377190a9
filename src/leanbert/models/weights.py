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

POSITION_IDS = "position_ids"
"""Of old files: integers that say that positions are 0, 1, 2 and so on."""

MODEL_PREFIX = "model."
LFS = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for another one, in a repository that was cloned without git-lfs."""
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

    Raises `UserError` if there is none, or one is damaged or carries code, or a tensor is not one of numbers.
    """
    for name in FOLDER_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _checked(_read_file(folder / name), folder / name)
        if index.is_file():
            return _checked(_read_shards(index), index)
    raise UserError(f"{folder}: no {' or '.join(FOLDER_FILES)} in it. Save the model there first")


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
        raise UserError(f"{path}: cannot be read ({_first_line(error)}). Copy the file again") from None
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
        prefix = MODEL_PREFIX
        state = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a LeanBERT checkpoint. Name a .ckpt of a run, or a folder") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Stored(config, state, kept.get("task", "mlm"), facts)


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


def _read_file(path: Path) -> StateDict:
    if path.suffix != ".safetensors":
        state = load_pickled(path, "Ask for a .safetensors file.")
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise UserError(f"{path}: not a table of tensors. Save it with save_pretrained")
        return state
    refuse_pointer(path)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}). Copy the file again") from None


def _read_shards(index: Path) -> StateDict:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name for name in shards.values()):
        raise UserError(f"{index}:1: no weight_map from weights to names of files. Save the model again")
    # Only the last part of the name counts: an index must not reach out of its folder.
    files = {weight: index.parent / Path(name).name for weight, name in shards.items()}
    state: StateDict = {}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise UserError(f"{path}: no such file, though {index.name} lists it. Copy it too")
        found = _read_file(path)
        if lost := min({weight for weight, file in files.items() if file == path} - found.keys(), default=None):
            raise UserError(f"{path}: lacks {lost}, which {index.name} says is in it. Take all files from one model")
        state |= {weight: tensor for weight, tensor in found.items() if files.get(weight, path) == path}
    return state


def _checked(state: StateDict, path: Path) -> StateDict:
    for name, tensor in state.items():
        problem = None
        if not tensor.is_floating_point() and not name.endswith(POSITION_IDS):
            problem = f"is of {str(tensor.dtype).removeprefix('torch.')}, not of a floating type"
        elif tensor.layout != torch.strided or tensor.device.type != "cpu":
            problem = "has no values that could be read"
        if problem:
            raise UserError(f"{path}: {name} {problem}. Save the model again with save_pretrained")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
