"""Hugging Face folders in and out: BERT and ModernBERT with each head, and encoder with decoder, with equal logits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from leanbert.errors import UserError
from leanbert.files import write_text_atomically
from leanbert.models.base import EncoderModel
from leanbert.models.config import ResolvedConfig
from leanbert.models.embeddings import padded_rows
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import LazyWeights, ModelMetadata, StateDict, Stored
from leanbert.pretrained.architectures import make_model
from leanbert.pretrained.huggingface.classes import ADD_MODEL_TYPE, POOLER, Layout, read_layout, write_layout
from leanbert.pretrained.huggingface.naming import (
    DECODER_TOKENS,
    HEAD_BIAS,
    OF_VOCABULARY,
    TARGET_EMBEDDING,
    TOKEN_EMBEDDING,
    Names,
)
from leanbert.pretrained.weights import read_folder, write_safetensors
from leanbert.untrusted import read_json

log = logging.getLogger(__name__)

WRAPPERS = ("module.", "model.")
"""What DistributedDataParallel, and modules that hold a model, put before the names of weights."""


def read_huggingface(folder: str | Path) -> Stored:
    """Read a model in a folder made by `save_pretrained` or by our export: its `config.json` now, the weights later.

    The state is in float32 on the CPU. It has no head where the folder has none (`BertModel`), which is logged as a
    warning. The task is the one that was exported; of a folder that we did not write it is its class's.
    Raises `UserError` for an architecture that we do not have, or weights that do not fit `config.json`.
    """
    folder = Path(folder)
    path = folder / "config.json"
    layout = read_layout(read_json(path), path)
    return Stored(layout.config, layout.metadata, folder, lambda: _read_weights(layout, folder))


def _read_weights(layout: Layout, folder: Path) -> LazyWeights:
    theirs = _normalised(read_folder(folder), layout, folder)
    names = layout.names
    heads = {ours for ours in names if ours.startswith("head.")}
    if layout.metadata.task == "mlm" and not any(part in theirs for ours in heads for part in names[ours]):
        log.warning("%s holds an encoder only: the output head starts from fresh weights", folder)
        names = {ours: parts for ours, parts in names.items() if ours not in heads}
    return _translate(theirs, names, layout, folder)


def write_huggingface(
    model: EncoderModel,
    folder: str | Path,
    special_ids: Mapping[str, int | None] | None = None,
    metadata: ModelMetadata | None = None,
    source_ids: Mapping[str, int | None] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors` that `from_pretrained` of the model's class loads.

    `special_ids` are further integer settings, such as `pad_token_id`; `source_ids` are the encoder's where sources and
    targets have different tokenizers. Weights keep their dtype, and have exactly V rows.
    Heads that were removed leave as heads whose weights are 0: these classes have as many as fill the hidden size.
    Weights are written beside what is there and renamed; while they are new and `config.json` is old, it is away.
    Raises `UserError`, naming the setting, if no Hugging Face class expresses the model, or the disk is full.
    """
    settings, names = write_layout(model, metadata or ModelMetadata(model.task), special_ids or {}, source_ids)
    settings["dtype"] = str(model.encoder.embeddings.token.weight.dtype).removeprefix("torch.")
    folder = Path(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    write_safetensors(_their_state(model, names), weights, config)
    write_text_atomically(config, json.dumps(settings, indent=2) + "\n")


def _normalised(state: StateDict, layout: Layout, folder: Path) -> StateDict:
    """Bring old, wrapped and headless files to the names of today, and leave out what is not ours."""
    state = _renamed(state, lambda name: name.replace("_orig_mod.", ""), folder)
    (tokens,), prefix = layout.names[TOKEN_EMBEDDING], layout.prefix
    while not state.keys() & {tokens, tokens.removeprefix(prefix)} and (
        wrapper := next((each for each in WRAPPERS if any(name.startswith(each) for name in state)), None)
    ):
        state = _renamed(state, lambda name, wrapper=wrapper: name.removeprefix(wrapper), folder)  # type: ignore[misc]
    headless = not any(name.startswith(prefix) for name in state)
    if headless and layout.guessed:
        raise UserError(f"{folder}: config.json names no model_type, and nothing else tells it. {ADD_MODEL_TYPE}")
    state = _renamed(state, lambda name: (prefix if headless else "") + _of_today(name), folder)
    _check_tied(state, layout, folder)
    copy = None if TARGET_EMBEDDING in layout.names else state.pop(DECODER_TOKENS, None)
    if copy is not None and not (tokens in state and _equal(copy, state[tokens])):
        raise UserError(
            f"{folder}: encoder and decoder have different token embeddings, which is not supported. "
            "Take a model in which they are tied"
        )
    wanted = {part for parts in layout.names.values() for part in parts}
    return {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(layout.ignored)}


def _renamed(state: StateDict, rename: Callable[[str], str], folder: Path) -> StateDict:
    renamed = {rename(name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise UserError(f"{folder}: two weights differ only in old and new ways of naming. Save the model again")
    return renamed


def _of_today(name: str) -> str:
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _check_tied(state: StateDict, layout: Layout, folder: Path) -> None:
    """Take the output's bias by any of its names, in place; raise `UserError` if its matrix is not the embedding.

    transformers ties both only where a file does not have them.
    """
    if HEAD_BIAS not in layout.names:
        return
    (bias,) = layout.names[HEAD_BIAS]
    (table,) = layout.names.get(TARGET_EMBEDDING, layout.names[TOKEN_EMBEDDING])
    head = bias.removesuffix("bias").removesuffix("decoder.") + "decoder."
    if (other := state.pop(f"{head}bias", None)) is not None:
        state[bias] = other
    matrix = state.get(f"{head}weight")
    if not layout.tied and bias in state and (matrix is None or other is None):
        raise UserError(
            f"{folder}: tie_word_embeddings is false in config.json, but the weights lack {head}weight or {head}bias. "
            "Set it to true if the output is the token embedding"
        )
    if matrix is not None and table in state and not _equal(matrix, state[table]):
        raise UserError(
            f"{folder}: {head}weight, the output, is another matrix than the token embedding, which is not supported. "
            "Take a model in which they are tied"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _translate(theirs: StateDict, names: Names, layout: Layout, folder: Path) -> LazyWeights:
    wanted = {part for parts in names.values() for part in parts}
    for problem, keys in (("lack", wanted - theirs.keys()), ("have unexpected", theirs.keys() - wanted)):
        if keys:
            raise UserError(
                f"{folder}: the weights {problem} {min(keys)} ({len(keys)} in all). "
                "Take config.json and weights from one model"
            )
    with torch.device("meta"):
        model = make_model(layout.config, layout.metadata)
    tokens, shapes = _tokens(model), {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    weights: dict[str, Callable[[], Tensor]] = {}
    for ours, parts in names.items():
        rows, *width = shapes.get(ours, [0])
        expected = [tokens.get(ours, rows) // len(parts), *width]
        for part in parts:
            if (found := list(theirs[part].shape)) != expected:
                raise UserError(
                    f"{folder}: {part} has shape {found}, config.json asks for {expected}. "
                    "Take both files from one model"
                )
            if not torch.stack(theirs[part].float().aminmax()).isfinite().all():  # isfinite itself makes three tensors
                raise UserError(f"{folder}: {part} holds numbers that are not finite. Copy the file again")
        weights[ours] = partial(_join, [theirs[part] for part in parts], padded=ours in tokens)
    return LazyWeights(weights)


def _join(parts: list[Tensor], *, padded: bool) -> Tensor:
    """Return parts of a weight as one, float32, `padded` with rows of no token."""
    whole = torch.cat([part.float() for part in parts]) if len(parts) > 1 else parts[0].float()
    if not padded:
        return whole
    missing = padded_rows(len(whole)) - len(whole)
    return F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, missing))


def _tokens(model: EncoderModel) -> dict[str, int]:
    """Return how many rows are tokens, by the weights that have a row for each."""
    sources = targets = model.config.vocab_size or 0
    if isinstance(model, Seq2SeqModel) and model.target_vocab_size is not None:
        targets = model.target_vocab_size
    return dict(zip(OF_VOCABULARY, (sources, targets, targets), strict=True))


def _their_state(model: EncoderModel, names: Names) -> StateDict:
    ours = model.state_dict()
    for part, module in model.named_children():
        # a table of sines is, to Hugging Face, one that was learned
        if (table := getattr(getattr(module, "embeddings", None), "fixed_position", None)) is not None:
            ours[f"{part}.embeddings.position.weight"] = table
    for name, rows in _tokens(model).items():
        if name in ours:
            ours[name] = ours[name][:rows]
    if other := sorted(names.keys() ^ ours.keys()):
        raise UserError(
            f"{other[0]}: the model has another layer there, such as one of low rank, which no class of transformers "
            "has. Export with onnx"
        )
    state: StateDict = {}
    two = isinstance(model, Seq2SeqModel)  # what its halves share can be written only as copies
    for name, theirs in names.items():
        whole = _pad_heads(name, ours[name], model.config)
        for part, tensor in zip(theirs, whole.chunk(len(theirs)), strict=True):
            state[part] = tensor.detach().to("cpu", copy=two).contiguous()
    if two:
        tokens = state[names[TOKEN_EMBEDDING][0]]
        state.setdefault(DECODER_TOKENS, tokens.clone())
        state[f"{POOLER}dense.weight"] = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=tokens.dtype)
        state[f"{POOLER}dense.bias"] = torch.zeros(tokens.shape[1], dtype=tokens.dtype)
    return state


def _pad_heads(ours: str, tensor: Tensor, config: ResolvedConfig) -> Tensor:
    """Append zeros for the heads that the model lacks: rows to q, k and v, columns to the output projection."""
    missing = config.hidden_size - config.num_heads * config.head_size
    projections = {"attention.qkv": 3, "cross_attention.query": 1, "cross_attention.key_value": 2}
    module = ours.rpartition(".")[0]
    count = next((count for name, count in projections.items() if module.endswith(name)), 0)
    if missing and count:
        parts = tensor.unflatten(0, (count, -1))  # [count, H * d, D], or [count, H * d] for a bias
        return F.pad(parts, (0, 0) * (tensor.dim() - 1) + (0, missing)).flatten(0, 1)
    if missing and ours.endswith("attention.output.weight"):
        return F.pad(tensor, (0, missing))
    return tensor
