"""Weights on disk, written whole and read so that no file can run code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from leanbert import shard_files
from leanbert.errors import UserError, first_line
from leanbert.files import explain_disk_errors, temporary
from leanbert.models.config import EncoderConfig
from leanbert.models.stored import LazyWeights, ModelMetadata, StateDict, Stored
from leanbert.untrusted import check_sums, load_pickled, read_json, refuse_pointer

POSITION_IDS = "position_ids"
"""Of old files: integers that say that positions are 0, 1, 2 and so on."""

MODEL_PREFIX = "model."
FIX = "Use another checkpoint of the run."
SETTINGS_FILES = ("config.json", "leanbert.json")
"""What a folder says its weights by: Hugging Face's, or our own."""
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


def holds_model(folder: Path) -> bool:
    """Whether a folder says that there is a model in it, of Hugging Face or our own."""
    return any((folder / name).is_file() for name in SETTINGS_FILES)


def read_folder(folder: Path) -> StateDict:
    """Read all weights of a Hugging Face folder, one file or sharded, on the CPU in their stored dtype.

    Raises `UserError` if there is none, or one is damaged or carries code, or a tensor is not one of numbers.
    """
    for name in FOLDER_FILES:
        for path, read in ((folder / name, _read_file), (folder / f"{name}.index.json", _read_shards)):
            if path.is_file():
                return _checked(read(path), path)
    raise UserError(f"{folder}: no {' or '.join(FOLDER_FILES)} in it. Save the model there first")


def read_checkpoint(path: Path) -> Stored:
    """Read a LeanBERT checkpoint; its files are compared with their checksums when weights are asked for.

    Tensors stay mapped to a file; of a checkpoint in shards each is read when it is asked for. Raises `UserError` if it
    is missing, damaged, carries code, or is not of LeanBERT.
    """
    in_shards = shard_files.holds_shards(path)
    if not in_shards and not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint or folder. Correct model.init_from; a model of the Hugging Face Hub is "
            "fetched first: hf download NAME --local-dir FOLDER"
        )
    stored = unpack(shard_files.read_rest(path, FIX) if in_shards else load_pickled(path, FIX), path)

    def read_one(reader: shard_files.Reader, name: str, blank: Tensor) -> Tensor:
        place = {"state_dict": {MODEL_PREFIX + name: blank}}
        return next(iter(shard_files.fill(path, place, FIX, reader=reader)["state_dict"].values()))

    def read_weights() -> Mapping[str, Tensor]:
        state = stored.read_weights()
        if not in_shards:
            check_sums(path, FIX)
            return state
        shard_files.check_sums(path, FIX)
        reader = shard_files.Reader(str(path))
        return LazyWeights({name: partial(read_one, reader, name, blank) for name, blank in state.items()})

    return stored._replace(read_weights=read_weights)


def unpack(checkpoint: Any, path: Path) -> Stored:
    """Return the model in a checkpoint read from `path`. Raises `UserError` if it is not of LeanBERT."""
    try:
        kept = checkpoint["leanbert"]
        config = EncoderConfig(**kept["encoder"]).resolved()
        weights = checkpoint["state_dict"]
        said = {"max_length": kept.get("max_length"), **kept.get("data", {}), **kept.get("model", {})}
        state = {name.removeprefix(MODEL_PREFIX): weights[name] for name in weights if name.startswith(MODEL_PREFIX)}
        task = kept.get("task", "mlm")
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a LeanBERT checkpoint. Name a .ckpt of a run, or a folder") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return Stored(config, ModelMetadata.read(task, said, path, FIX), path, lambda: state)


def write_safetensors(state: StateDict, path: Path, settings: Path) -> None:
    """Write tensors, beside what is at `path`, and rename them; `settings`, the file that is about the old ones, goes.

    Raises `UserError` if the disk is full, or forbids it: nothing has changed then.
    """
    with explain_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as building:
            building.touch()
            mode = building.stat().st_mode
            try:
                safetensors.torch.save_file(state, building, metadata={"format": "pt"})
            except SafetensorError as error:  # what the system says is in its text
                raise UserError(f"{path}: cannot be written ({error}). Free space, or choose another folder") from None
            building.chmod(mode)  # safetensors makes files that nobody else may read
            settings.unlink(missing_ok=True)
            os.replace(building, path)


def _read_file(path: Path) -> StateDict:
    if path.suffix != ".safetensors":
        state = load_pickled(path, "Ask for a .safetensors file.")
        if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
        ):
            raise UserError(f"{path}: not a table of tensors. Save it with save_pretrained")
        return state
    return read_safetensors(path)


def read_safetensors(path: Path) -> StateDict:
    """Read the tensors of one file. Raises `UserError` if it is damaged."""
    refuse_pointer(path)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}). Copy the file again") from None


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
