"""Folders of LeanBERT's own: any model it has, with tensors that are mostly zeros stored compactly.

`leanbert.json` says what model it is; `model.safetensors` has each weight once, by our names. A tensor with enough
zeros is there as two: `NAME.mask`, uint8 [ceil(n / 8)], has one bit for each of its n weights in row-major order, the
highest bit of a byte first, and 1 where the weight is not zero; `NAME.values` has the others, in their order and dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from leanbert.data.store.checksums import file_digest
from leanbert.errors import UserError
from leanbert.files import write_text_atomically
from leanbert.models.base import EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.stored import LazyWeights, ModelMetadata, StateDict, Stored, describe, read_description
from leanbert.pretrained.architectures import make_model
from leanbert.pretrained.weights import read_safetensors, write_safetensors
from leanbert.untrusted import read_json

SETTINGS, WEIGHTS = "leanbert.json", "model.safetensors"
MASK, VALUES = ".mask", ".values"

VERSION = 1
"""Of the format; a file of another one is refused."""

FIX = "Export the model again."


class Packed(NamedTuple):
    """A tensor of n weights: which are not zero, uint8 [ceil(n / 8)], and these [k]."""

    mask: Tensor
    values: Tensor


def pack(tensor: Tensor) -> Packed | None:
    """Return a tensor on the CPU as mask and values; None where these would not take fewer bytes.

    All is exact but the sign of zeros: -0.0 becomes 0.0.
    """
    kept = tensor != 0
    mask_bytes, values_bytes = -(-tensor.numel() // 8), int(kept.sum()) * tensor.itemsize
    if mask_bytes + values_bytes >= tensor.nbytes:
        return None
    return Packed(torch.from_numpy(np.packbits(kept.numpy())), tensor[kept])


def unpack(packed: Packed, shape: torch.Size) -> Tensor:
    """Return the tensor of this shape. Raises `ValueError`, which says what it has, if it is not of such a tensor."""
    return packed.values.new_zeros(shape).masked_scatter_(_kept(packed, shape), packed.values)


def _kept(packed: Packed, shape: torch.Size) -> Tensor:
    """Return where a tensor of this shape is not zero. Raises as `unpack`."""
    (mask, values), count = packed, shape.numel()
    if mask.dtype != torch.uint8 or mask.shape != (-(-count // 8),):
        raise ValueError(f"has a mask {list(mask.shape)} for {count} weights")
    bits = np.unpackbits(mask.numpy())
    if bits[count:].any() or bits.sum() != values.numel():
        raise ValueError(f"has {bits.sum()} bits in its mask for {values.numel()} of {count} weights")
    return torch.from_numpy(bits[:count]).bool().view(shape)


def write_sparse(model: EncoderModel, folder: Path, metadata: ModelMetadata) -> None:
    """Write the folder of a model; weights keep their dtype.

    Weights are written beside what is there and renamed; while they are new and `leanbert.json` is old, it is away.
    Raises `UserError` if the model has other layers than its settings say, or the disk is full.
    """
    layout = _layout(model)
    if layout != _layout(_without_weights(model.config, metadata)):
        raise UserError(
            f"{folder}: the model has other layers than its settings say, such as low-rank ones, which cannot be "
            "stored here. Export with onnx"
        )
    state: StateDict = {}
    for name, tensor in model.state_dict().items():
        if layout[name].owner == name:
            whole = tensor.cpu().contiguous()
            packed = pack(whole)
            state |= {name: whole} if packed is None else {name + MASK: packed.mask, name + VALUES: packed.values}
    write_safetensors(state, folder / WEIGHTS, folder / SETTINGS)
    said = {"version": VERSION, "weights": file_digest(folder / WEIGHTS), **describe(model.config, metadata)}
    write_text_atomically(folder / SETTINGS, json.dumps(said, indent=2) + "\n")


def read_sparse(folder: Path) -> Stored:
    """Read what `leanbert.json` says, and the weights, on the CPU in their stored dtype, when they are asked for.

    Raises `UserError` for another version of the format, and for files that are damaged or not of one export.
    """
    path = folder / SETTINGS
    said = read_json(path)
    if said.get("version") != VERSION:
        raise UserError(
            f"{path}: version {said.get('version')!r} of the format, here is {VERSION}. Use the LeanBERT that wrote it"
        )
    config, metadata = read_description(said, path, FIX)

    def read_weights() -> LazyWeights:
        weights = folder / WEIGHTS
        try:
            digest = file_digest(weights)
        except OSError as error:
            raise UserError(f"{weights}: cannot be read ({error.strerror}). {FIX}") from None
        if digest != said.get("weights"):
            raise UserError(f"{weights}: damaged, or not what {SETTINGS} was written with. {FIX}")
        return _unpacked(read_safetensors(weights), _without_weights(config, metadata), weights)

    return Stored(config, metadata, folder, read_weights)


class _Weight(NamedTuple):
    owner: str
    """The first of its names."""
    shape: torch.Size


def _layout(model: EncoderModel) -> dict[str, _Weight]:
    """Return each weight of a model by name."""
    owners: dict[int, str] = {}
    weights = model.state_dict(keep_vars=True).items()
    return {name: _Weight(owners.setdefault(id(weight), name), weight.shape) for name, weight in weights}


def _without_weights(config: ResolvedConfig, metadata: ModelMetadata) -> EncoderModel:
    with torch.device("meta"):
        return make_model(config, metadata)


def _unpacked(stored: StateDict, model: EncoderModel, path: Path) -> LazyWeights:
    """Return the weights of a model by all their names, and what else there is in the file `path`."""
    weights: dict[str, Tensor | Callable[[], Tensor]] = {}
    for name, (owner, shape) in _layout(model).items():
        try:
            if owner != name:
                weights[name] = weights[owner]
            elif name in stored:
                weights[name] = stored.pop(name)
            else:
                packed = Packed(stored.pop(name + MASK), stored.pop(name + VALUES))
                _kept(packed, shape)
                weights[name] = partial(unpack, packed, shape)
        except KeyError as error:
            raise UserError(f"{path}: lacks {error.args[0]}. {FIX}") from None
        except ValueError as error:
            raise UserError(f"{path}: {name} {error}. {FIX}") from None
    return LazyWeights(weights | stored)
