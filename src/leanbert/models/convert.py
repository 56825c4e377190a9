"""Hugging Face folders in and out: `BertForMaskedLM` and `ModernBertForMaskedLM`, with equal logits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from leanbert.errors import UserError
from leanbert.models.config import SETTING, ResolvedConfig
from leanbert.models.embeddings import padded_rows
from leanbert.models.huggingface_config import bert_settings, modernbert_settings, read_bert, read_modernbert
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.naming import HEAD_BIAS, TOKEN_EMBEDDING, Names, bert_names, modernbert_names
from leanbert.models.weights import StateDict, Stored, read_folder, read_json

log = logging.getLogger(__name__)


class Family(NamedTuple):
    """One Hugging Face model class: how its settings and weights are named."""

    architectures: tuple[str, ...]  # accepted in config.json; the first is written
    prefix: str  # of the encoder's weights, absent where it was saved without a head
    names: Callable[[ResolvedConfig], Names]
    read_settings: Callable[[dict[str, Any], Path], ResolvedConfig]
    settings: Callable[[ResolvedConfig], dict[str, Any]]
    ignored: tuple[str, ...]  # weights that play no part in masked language modelling, or repeat others


FAMILIES = {
    "bert": Family(
        ("BertForMaskedLM", "BertModel", "BertForPreTraining"),
        "bert.",
        bert_names,
        read_bert,
        bert_settings,
        ("bert.pooler.", "bert.embeddings.position_ids", "cls.seq_relationship.", "cls.predictions.decoder."),
    ),
    "modernbert": Family(
        ("ModernBertForMaskedLM", "ModernBertModel"),
        "model.",
        modernbert_names,
        read_modernbert,
        modernbert_settings,
        ("decoder.weight",),
    ),
}


def read_huggingface(folder: str | Path) -> Stored:
    """Read settings and weights of a model in a folder made by `save_pretrained` or by our export.

    The state, for `MaskedLanguageModel`, is in float32 on the CPU. It has no head where the folder has none
    (`BertModel`), which is logged as a warning.
    Raises `UserError` for an architecture that we do not have, or weights that do not fit `config.json`.
    """
    folder = Path(folder)
    path = folder / "config.json"
    settings = read_json(path)
    family = _family(settings, path)
    config = family.read_settings(settings, path)
    theirs = _normalised(read_folder(folder), family)
    names = family.names(config)
    if not any(part in theirs for ours in names if ours.startswith("head.") for part in names[ours]):
        log.warning("%s holds an encoder only: the output head starts from fresh weights", folder)
        names = {ours: parts for ours, parts in names.items() if not ours.startswith("head.")}
    return Stored(config, _translate(theirs, names, config, folder), "mlm", {})


def write_huggingface(
    model: MaskedLanguageModel, folder: str | Path, special_ids: Mapping[str, int] | None = None
) -> None:
    """Write `config.json` and `model.safetensors` that `AutoModelForMaskedLM.from_pretrained` loads.

    `special_ids` are further integer settings, such as `pad_token_id`. Weights keep their dtype, and have
    exactly V rows. Heads that were removed leave as heads whose weights are 0: these classes have as many as fill
    the hidden size. Raises `UserError`, naming the setting, if no Hugging Face class expresses the model.
    """
    config = _with_all_heads(model.config)
    family = FAMILIES[_family_name(config)]
    defaults = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    settings = {
        "architectures": [family.architectures[0]],
        **defaults,
        **family.settings(config),
        **(special_ids or {}),
        "dtype": str(model.head.bias.dtype).removeprefix("torch."),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(_their_state(model, family), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _with_all_heads(config: ResolvedConfig) -> ResolvedConfig:
    """Return the configuration with as many heads as fill the hidden size, or raise `UserError`."""
    full, rest = divmod(config.hidden_size, config.head_size)
    if rest:
        raise UserError(
            f"{SETTING}.head_size: Hugging Face cannot express heads of {config.head_size}, which do not divide "
            f"hidden_size {config.hidden_size}. Train with a divisor to export"
        )
    if config.num_heads > full:
        raise UserError(
            f"{SETTING}.num_heads: Hugging Face cannot express {config.num_heads} heads of {config.head_size} with "
            f"hidden_size {config.hidden_size}. Train with at most {full} to export"
        )
    return replace(config, num_heads=full)


def _family(settings: dict[str, Any], path: Path) -> Family:
    family = FAMILIES.get(settings.get("model_type", ""))
    known = [name for each in FAMILIES.values() for name in each.architectures]
    if family is None:
        kind = settings.get("model_type")
        raise UserError(f"{path}: model_type {kind!r} is not supported. Take one of {', '.join(known)}")
    named = settings.get("architectures") or list(family.architectures)
    if not set(named) & set(family.architectures):
        raise UserError(f"{path}: architecture {named[0]} is not supported. Take one of {', '.join(known)}")
    return family


def _family_name(config: ResolvedConfig) -> str:
    """Which class the configuration fits, or `UserError` with the first setting that does not fit."""
    modern = config.position == "rotary"
    needed: dict[str, tuple[Any, ...]] = (
        {"norm_position": ("pre",), "activation": ("geglu", "swiglu"), "type_vocab_size": (0,)}
        if modern
        else {"norm_position": ("post",), "activation": ("gelu",), "bias": (True,), "local_window": (0,)}
    )
    target = "ModernBertForMaskedLM" if modern else "BertForMaskedLM"
    for name, fitting in needed.items():
        if (value := getattr(config, name)) not in fitting:
            raise UserError(
                f"{SETTING}.{name}: {target} cannot express {value!r} with position {config.position!r}. "
                f"Train with {' or '.join(map(repr, fitting))} to export"
            )
    if not modern and config.type_vocab_size == 0:
        raise UserError(f"{SETTING}.type_vocab_size: {target} cannot express 0. Train with 1 or 2 to export")
    return "modernbert" if modern else "bert"


def _normalised(state: StateDict, family: Family) -> StateDict:
    """Bring old and headless files to the names of today, and leave out what is not ours."""
    headless = not any(name.startswith(family.prefix) for name in state)
    renamed = {
        (family.prefix if headless else "") + name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
        for name, tensor in state.items()
    }
    return {name: tensor for name, tensor in renamed.items() if not name.startswith(family.ignored)}


def _translate(theirs: StateDict, names: Names, config: ResolvedConfig, folder: Path) -> StateDict:
    _check_keys(theirs, names, folder)
    shapes = _expected_shapes(config)
    state: StateDict = {}
    for ours, parts in names.items():
        tensor = torch.cat([theirs[part] for part in parts]) if len(parts) > 1 else theirs[parts[0]]
        found = list(tensor.shape)
        if found != shapes[ours]:
            raise UserError(
                f"{folder}: {' + '.join(parts)} has shape {found}, config.json asks for {shapes[ours]}. "
                "Take both files from one model"
            )
        state[ours] = _pad(ours, tensor.float(), config)
    return state


def _check_keys(theirs: StateDict, names: Names, folder: Path) -> None:
    wanted = {part for parts in names.values() for part in parts}
    for problem, keys in (("lack", wanted - theirs.keys()), ("have unexpected", theirs.keys() - wanted)):
        if keys:
            raise UserError(
                f"{folder}: the weights {problem} {min(keys)} ({len(keys)} in all). "
                "Take config.json and weights from one model"
            )


def _expected_shapes(config: ResolvedConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = MaskedLanguageModel(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in (TOKEN_EMBEDDING, HEAD_BIAS):
        shapes[name][0] = model.head.vocab_size
    return shapes


def _pad(ours: str, tensor: Tensor, config: ResolvedConfig) -> Tensor:
    if ours not in (TOKEN_EMBEDDING, HEAD_BIAS):
        return tensor
    missing = padded_rows(len(tensor)) - len(tensor)
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing))


def _their_state(model: MaskedLanguageModel, family: Family) -> StateDict:
    ours = model.state_dict()
    table = model.encoder.embeddings.fixed_position
    if table is not None:  # a table of sines is, to Hugging Face, one that was learned
        ours["encoder.embeddings.position.weight"] = table
    for name in (TOKEN_EMBEDDING, HEAD_BIAS):
        ours[name] = ours[name][: model.head.vocab_size]
    state: StateDict = {}
    for name, parts in family.names(model.config).items():
        whole = _pad_heads(name, ours[name], model.config)
        for part, tensor in zip(parts, whole.chunk(len(parts)), strict=True):
            state[part] = tensor.detach().cpu().contiguous()
    return state


def _pad_heads(ours: str, tensor: Tensor, config: ResolvedConfig) -> Tensor:
    """Append zeros for the heads that the model lacks: rows to q, k and v, columns to the output projection."""
    missing = config.hidden_size - config.num_heads * config.head_size
    if missing and ".attention.qkv." in ours:
        parts = tensor.unflatten(0, (3, -1))  # [3, H * d, D], or [3, H * d] for a bias
        return F.pad(parts, (0, 0) * (tensor.dim() - 1) + (0, missing)).flatten(0, 1)
    if missing and ours.endswith(".attention.output.weight"):
        return F.pad(tensor, (0, missing))
    return tensor
