"""Which class of Hugging Face holds a model: its settings, and the names of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.classifier import Classifier
from leanbert.models.config import SETTING, ResolvedConfig
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.architectures import kind_of
from leanbert.pretrained.huggingface.config import bert_settings, modernbert_settings, read_bert, read_modernbert
from leanbert.pretrained.huggingface.naming import Kind, Names, bert_names, encoder_decoder_names, modernbert_names
from leanbert.pretrained.huggingface.tasks import (
    decoder_settings,
    label_settings,
    own_settings,
    read_decoder,
    read_labels,
    read_metadata,
)

ENCODER_DECODER = "EncoderDecoderModel"
ADD_MODEL_TYPE = 'If it is a BERT, add "model_type": "bert"'
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")

HEADS: dict[Kind, str] = {
    "mlm": "ForMaskedLM",
    "text": "ForSequenceClassification",
    "word": "ForTokenClassification",
}
"""How the classes of a family are named, after its own name."""


class Family(NamedTuple):
    """The classes of one architecture: how their settings and weights are named."""

    name: str
    bare: tuple[str, ...]  # further classes that are read as masked language models
    known_by: frozenset[str]  # settings that tell it where config.json does not name its model_type
    prefix: str  # of the encoder's weights, absent where it was saved without a head
    names: Callable[[ResolvedConfig, Kind], Names]
    read_settings: Callable[[dict[str, Any], Path], ResolvedConfig]
    settings: Callable[[ResolvedConfig], dict[str, Any]]
    ignored: tuple[str, ...]  # weights that play no part in our models, or repeat others

    @property
    def classes(self) -> dict[Kind, str]:
        """Names of the classes by what they have besides the encoder."""
        return {kind: self.name + head for kind, head in HEADS.items()}


FAMILIES = {
    "bert": Family(
        "Bert",
        ("BertModel", "BertForPreTraining"),
        frozenset({"hidden_size", "num_hidden_layers", "hidden_dropout_prob", "type_vocab_size"}),
        "bert.",
        bert_names,
        read_bert,
        bert_settings,
        ("bert.pooler.", "bert.embeddings.position_ids", "cls.seq_relationship.", "cls.predictions.decoder."),
    ),
    "modernbert": Family(
        "ModernBert",
        ("ModernBertModel",),
        frozenset({"hidden_size", "num_hidden_layers", "norm_eps", "local_attention"}),
        "model.",
        modernbert_names,
        read_modernbert,
        modernbert_settings,
        ("decoder.weight",),
    ),
}
POOLER = "encoder.pooler."
"""Of an encoder that is read by a decoder: transformers has one, and uses it for nothing."""
IGNORED_BESIDE_DECODER = (
    POOLER, "decoder.cls.predictions.decoder.", "encoder.embeddings.position_ids",
    "decoder.bert.embeddings.position_ids",
)  # fmt: skip


class Layout(NamedTuple):
    """What a folder holds: a model with `config` and `metadata`, its weights by `names`.

    Weights that begin with `ignored` and have no name play no part. `prefix` begins the encoder's weights. `tied`:
    whether the output matrix is the token embedding where no weights say otherwise; `guessed`: whether config.json
    does not name what it is.
    """

    config: ResolvedConfig
    metadata: ModelMetadata
    names: Names
    ignored: tuple[str, ...]
    prefix: str
    tied: bool
    guessed: bool


def read_layout(settings: dict[str, Any], path: Path) -> Layout:
    """Return what `config.json` at `path` describes; raises `UserError` for a class that we do not have."""
    model_type, guessed = _model_type(settings, path), settings.get("model_type") is None
    if model_type == "encoder-decoder":
        config, layers, tokens = read_decoder(settings, path)
        metadata = read_metadata(settings, "seq2seq", path, decoder_layers=layers)
        if separate := metadata.target_vocab_size is not None or tokens != config.vocab_size:
            metadata = replace(metadata, target_vocab_size=tokens)
        names = encoder_decoder_names(config, layers, separate)
        tied = _tied(settings, path) and _tied(settings["decoder"], path)
        return Layout(config, metadata, names, IGNORED_BESIDE_DECODER, "encoder.", tied, guessed)
    family = FAMILIES[model_type]
    kind = _kind(settings, family, path)
    config = family.read_settings(settings, path)
    labels = {} if kind == "mlm" else read_labels(settings, kind, path)
    metadata = read_metadata(settings, kind, path, **labels)
    names = family.names(config, kind)
    return Layout(config, metadata, names, family.ignored, family.prefix, _tied(settings, path), guessed)


def write_layout(
    model: EncoderModel,
    metadata: ModelMetadata,
    special_ids: Mapping[str, int | None],
    source_ids: Mapping[str, int | None] | None = None,
) -> tuple[dict[str, Any], Names]:
    """Return `config.json` and the names of the weights of a model, whose heads are made complete.

    `source_ids` are the encoder's where its tokenizer is another one.
    Raises `UserError`, naming the setting, if no class of Hugging Face expresses the model.
    """
    config, kind = _with_all_heads(model.config), kind_of(model.task)
    if isinstance(model, Seq2SeqModel):
        _check_expressible(config, ENCODER_DECODER)
        if model.pointer is not None:
            raise UserError("model.copy: transformers' class cannot copy. Export with onnx, or train without it")
        layers, tokens = len(model.decoder.blocks), model.target_vocab_size
        ids, their_ids = (
            {name: given.get(name) for name in SPECIAL_IDS} for given in (special_ids, source_ids or special_ids)
        )
        settings = {
            "architectures": [ENCODER_DECODER],
            **special_ids,
            **decoder_settings(config, layers, ids, tokens or config.vocab_size, their_ids),
            **own_settings(replace(metadata, target_vocab_size=tokens)),
        }
        return settings, encoder_decoder_names(config, layers, tokens is not None)
    family = FAMILIES["modernbert" if config.position == "rotary" else "bert"]
    _check_expressible(config, family.classes[kind])
    settings = {
        "architectures": [family.classes[kind]],
        **dict.fromkeys(SPECIAL_IDS),
        **family.settings(config),
        **special_ids,
        **own_settings(metadata),
    }
    if isinstance(model, Classifier):
        settings |= label_settings(model, metadata)
    return settings, family.names(config, kind)


def _tied(settings: dict[str, Any], path: Path) -> bool:
    tied = settings.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_word_embeddings {tied!r} is neither true nor false. Copy the file again")
    return tied


def _model_type(settings: dict[str, Any], path: Path) -> str:
    """Return the `model_type`, which Google's BERT and old conversions of others do not name."""
    kind, named = settings.get("model_type"), _architectures(settings, path)
    if kind in ("encoder-decoder", *FAMILIES):
        return kind
    if kind is not None:
        raise UserError(f"{path}: model_type {kind!r} is not supported. Take one of {', '.join(_known())}")
    if ENCODER_DECODER in named:
        return "encoder-decoder"
    for name, family in FAMILIES.items():
        if {*family.classes.values(), *family.bare} & set(named) or (not named and family.known_by <= settings.keys()):
            return name
    raise UserError(f"{path}: no model_type says what it is. {ADD_MODEL_TYPE}")


def _architectures(settings: dict[str, Any], path: Path) -> list[str]:
    named = settings.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{path}: architectures {named!r} is no list of names of classes. Copy the file again")
    return named


def _kind(settings: dict[str, Any], family: Family, path: Path) -> Kind:
    named = _architectures(settings, path) or [family.classes["mlm"]]
    for kind, name in family.classes.items():
        if name in named or (kind == "mlm" and set(named) & set(family.bare)):
            return kind
    raise UserError(f"{path}: architecture {named[0]} is not supported. Take one of {', '.join(_known())}")


def _known() -> list[str]:
    names = [name for family in FAMILIES.values() for name in (*family.classes.values(), *family.bare)]
    return [*names, ENCODER_DECODER]


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


def _check_expressible(config: ResolvedConfig, target: str) -> None:
    """Raise `UserError` with the first setting that the class `target` cannot express."""
    modern = config.position == "rotary"
    if modern and target == ENCODER_DECODER:
        raise UserError(
            f"{SETTING}.preset: transformers has no decoder with position 'rotary' that an {target} could take "
            "(ModernBERT's looks at no encoder). Export with onnx, or train with preset bert"
        )
    needed: dict[str, tuple[Any, ...]] = (
        {"norm_position": ("pre",), "activation": ("geglu", "swiglu"), "type_vocab_size": (0,)}
        if modern
        else {"norm_position": ("post",), "activation": ("gelu",), "bias": (True,), "local_window": (0,)}
    )
    for name, fitting in needed.items():
        if (value := getattr(config, name)) not in fitting:
            raise UserError(
                f"{SETTING}.{name}: {target} cannot express {value!r} with position {config.position!r}. "
                f"Train with {' or '.join(map(repr, fitting))} to export"
            )
    if not modern and config.type_vocab_size == 0:
        raise UserError(f"{SETTING}.type_vocab_size: {target} cannot express 0. Train with 1 or 2 to export")
