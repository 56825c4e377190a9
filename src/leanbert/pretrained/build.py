"""One function that makes a model with its initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from leanbert.errors import UserError
from leanbert.models.attention import SelfAttention
from leanbert.models.base import ENCODER, EncoderModel
from leanbert.models.config import EncoderConfig, ResolvedConfig
from leanbert.models.embeddings import INIT_STD
from leanbert.models.encoder import FeedForward
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.stored import LazyWeights, Stored
from leanbert.pretrained.architectures import make_model
from leanbert.pretrained.huggingface.convert import read_huggingface
from leanbert.pretrained.sparse import SETTINGS, read_sparse
from leanbert.pretrained.weights import read_checkpoint
from leanbert.shard_files import holds_shards

Model = TypeVar("Model", bound=EncoderModel)

OFFSETS = (-1, 1, -2, 2)
"""Neighbours at which the first heads of a model with learned positions look at first."""
POSITION_RMS = 0.1
"""Size of their positions at first: five times as large as tokens, which grow."""
NEIGHBOUR_GAIN = 0.8
"""Size of their query and key weights: enough for most of the attention to fall on the neighbour."""


def build_model(
    config: EncoderConfig,
    vocab_size: int,
    make: Callable[[ResolvedConfig], Any] = MaskedLanguageModel,
    *,
    init_from: str | Path | None = None,
    unigram_counts: np.ndarray | None = None,
) -> Any:
    """Build, then load or initialise; in torch's default dtype and device.

    Args:
        config: Architecture of a new model.
        vocab_size: Tokens of the tokenizer, V.
        make: Makes an `EncoderModel` of a whole configuration.
        init_from: Folder of Hugging Face or LeanBERT, or a checkpoint: it brings architecture and weights; of
            `config` only `dropout` and `attention_dropout`, where set, count. Of a model of another task the encoder is
            taken, and what its head has in common (`EncoderModel.inherits`).
        unigram_counts: Integers [V]: a new masked language model's output bias begins at the log frequencies.

    Raises:
        UserError: Settings or weights that do not fit, or weights for another vocabulary.

    """
    if init_from is not None:
        return _load(config, vocab_size, make, read_model(init_from))
    rows = max(config.vocab_size or 0, vocab_size)  # an imported model may have more rows than its tokenizer
    model = make(replace(config, vocab_size=rows).resolved())
    initialise(model)
    if unigram_counts is not None:
        set_unigram_bias(model, unigram_counts)
    return model


@torch.no_grad()
def initialise(model: EncoderModel) -> None:
    """Draw new weights: normal with standard deviation 0.02, biases 0, norms 1; stored padding rows 0.

    With pre-norm the output projections of both branches are 0, so that each block begins as the identity
    (Bachlechner et al. 2020, arXiv 2003.04887, gate the branches to the same end).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    for table, tokens in model.token_tables:
        table[tokens:].zero_()
    if model.config.norm_position == "pre":
        for module in model.modules():
            if isinstance(module, SelfAttention | FeedForward):
                module.output.weight.zero_()
    if model.config.position == "learned":
        look_at_neighbours(model)


@torch.no_grad()
def look_at_neighbours(model: EncoderModel) -> None:
    """Let heads of the first block begin by looking at the token before, after, two before and two after.

    With a learned table nothing says at first what is next to what, and training stays at the loss of word counts
    for thousands of steps until such heads have formed (Clark et al. 2019, arXiv 1906.04341, find them in trained
    BERTs). Here positions begin as sines and cosines in the first `head_size` dimensions, which tokens leave free, and
    queries and keys as that part of the input, the query turned by the offset: Trockman and Kolter 2023,
    arXiv 2305.09828, likewise begin attention as trained models have it. All of it is trained like any weight.
    """
    embeddings, size = model.encoder.embeddings, model.config.head_size
    if embeddings.position is None or size < 2:
        return
    pairs = size // 2
    # in float32, for bfloat16 has no whole numbers between 256 and 258;
    # the power leaves no distance at which all waves agree again, as equal steps would
    frequency = math.pi * ((torch.arange(pairs, dtype=torch.float32) + 0.5) / pairs) ** 1.5  # [pairs], radians
    angle = torch.arange(model.config.max_positions)[:, None] * frequency  # [positions, pairs]
    embeddings.position.weight[:, : 2 * pairs] = torch.cat((angle.cos(), angle.sin()), 1) * (POSITION_RMS * 2**0.5)
    embeddings.token.weight[:, : 2 * pairs] = 0.0
    attention: Any = model.encoder.blocks[0].attention
    projections = attention.qkv.weight.view(3, attention.num_heads, size, -1)
    query, key = projections[0, : len(OFFSETS)], projections[1, : len(OFFSETS)]  # [heads, d, D]
    projections[:2, : len(OFFSETS)] = 0.0
    cosine, sine = torch.arange(pairs), torch.arange(pairs) + pairs
    for offset, head_query, head_key in zip(OFFSETS, query, key, strict=False):
        turn = frequency * offset
        along, across = ((NEIGHBOUR_GAIN * part).to(head_key.dtype) for part in (turn.cos(), turn.sin()))
        head_key[cosine, cosine] = head_key[sine, sine] = NEIGHBOUR_GAIN
        head_query[cosine, cosine] = head_query[sine, sine] = along
        head_query[sine, cosine] = across
        head_query[cosine, sine] = -across


@torch.no_grad()
def set_unigram_bias(model: MaskedLanguageModel, counts: np.ndarray) -> None:
    """Let the head begin at the log unigram frequencies, with one added to each count.

    `counts` are integers [<= V], occurrences per token id. Raises `ValueError` if there are more than rows.
    """
    size = model.head.vocab_size
    if counts.ndim != 1 or len(counts) > size:
        raise ValueError(f"unigram counts have shape {counts.shape}, the vocabulary has {size} tokens")
    smoothed = np.pad(counts, (0, size - len(counts))).astype(np.float64) + 1.0
    model.head.bias[:size] = torch.tensor(np.log(smoothed / smoothed.sum()), dtype=model.head.bias.dtype)


def read_model(source: str | Path) -> Stored:
    """Read what a folder or a LeanBERT checkpoint says of its model; the weights when they are asked for.

    A folder is of Hugging Face or, with `leanbert.json`, of LeanBERT. Raises `UserError` for a file that is missing or
    damaged, for an architecture that we do not have, and for ONNX files, of which there are no weights to take.
    """
    source = Path(source)
    if (source / SETTINGS).is_file():
        return read_sparse(source)
    if source.is_dir() and not (source / "config.json").is_file() and any(source.glob("*.onnx")):
        raise UserError(
            f"{source}: holds ONNX files, which cannot be trained. Give the checkpoint that they are of; "
            "validate, test and predict take the folder with --ckpt_path"
        )
    is_model = source.is_dir() and not holds_shards(source)
    return read_huggingface(source) if is_model else read_checkpoint(source)


def blank_model(source: str | Path) -> EncoderModel:
    """Return the model at `source` without its weights, which are not read."""
    stored = read_model(source)
    return make_model(stored.config, stored.metadata)


def starting_config(config: EncoderConfig, stored: Stored) -> ResolvedConfig:
    """Return the architecture of a stored model, with the dropout that `config` sets."""
    rates = {"dropout": config.dropout, "attention_dropout": config.attention_dropout}
    changed: dict[str, Any] = {name: rate for name, rate in rates.items() if rate is not None}
    return replace(stored.config, **changed)


def rebuild(stored: Stored, vocab_size: int, target_vocab_size: int | None = None) -> EncoderModel:
    """Return the model that was stored, of its own task.

    Raises:
        UserError: It knows fewer than `vocab_size` tokens (its decoder: than `target_vocab_size`, if they are its own),
            or its weights do not fit.

    """
    known = stored.metadata.target_vocab_size or 0
    if target_vocab_size is not None and known < target_vocab_size:
        raise UserError(
            f"{stored.source}: the decoder knows {known} tokens, the tokenizer of targets has {target_vocab_size}. "
            "Use the tokenizer that belongs to the model"
        )
    return _load(EncoderConfig(), vocab_size, lambda config: make_model(config, stored.metadata), stored)


def _load(config: EncoderConfig, vocab_size: int, make: Callable[[ResolvedConfig], Model], stored: Stored) -> Model:
    known, source = stored.config.vocab_size, stored.source
    if known is None or known < vocab_size:
        raise UserError(
            f"{source}: the model knows {known} tokens, the tokenizer has {vocab_size}. "
            "Use the tokenizer that belongs to the model (data.tokenizer)"
        )
    model = make(starting_config(config, stored))
    same_task, everything = stored.metadata.task == model.task, stored.read_weights()
    if same_task:
        model.check_stored(stored, everything)
    initialise(model)
    taken = [name for name in everything if model.inherits(name, stored.metadata)]
    state = LazyWeights({name: partial(everything.__getitem__, name) for name in taken})
    load_weights(model, state, source, partial=not same_task or len(state) < len(everything))
    if not same_task:
        model.warm_start()
    return model


@torch.no_grad()
def load_weights(model: EncoderModel, state: Mapping[str, Tensor], source: Path, partial: bool = False) -> None:
    """Copy `state` into `model`, tensor by tensor; a `partial` one, or one of an encoder alone, leaves the rest.

    Raises `UserError`, naming `source`, if a key is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    partial |= all(name.startswith(ENCODER) for name in state)
    missing = [name for name in wanted if name not in state and (not partial or name.startswith(ENCODER))]
    unknown = [name for name in state if name not in wanted]
    for problem, names in (("lack", missing), ("have unexpected", unknown)):
        if names:
            raise UserError(f"{source}: the weights {problem} {names[0]} ({len(names)} in all). Save it again")
    for name, tensor in state.items():
        if (found := list(tensor.shape)) != (shape := list(wanted[name].shape)):
            raise UserError(
                f"{source}: {name} has shape {found}, the model asks for {shape}. Take weights of the same architecture"
            )
        wanted[name].copy_(tensor)
