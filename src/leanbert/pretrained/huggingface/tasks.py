"""What Hugging Face's `config.json` says of a task: labels, the decoder, and what only LeanBERT knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanbert.errors import UserError
from leanbert.models.classifier import Classifier
from leanbert.models.config import ResolvedConfig
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.architectures import TASKS
from leanbert.pretrained.huggingface.config import bert_settings, read_bert
from leanbert.pretrained.huggingface.naming import Kind
from leanbert.ranges import Range

OWN = "leanbert"
"""Key of what no class of transformers asks for: the task, and how it is answered."""
ELSEWHERE = ("labels", "problem", "decoder_layers", "decoder_start", "copy")
"""Metadata that a folder says in transformers' own terms, or that none of its classes can have."""
MAY_DIFFER = ("num_layers", "vocab_size")
"""Settings of a decoder that need not be the encoder's."""
PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
LABELS = Range(least=1, most=10**6, whole=True)
GENERATION = {
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "sample": "do_sample",
}


def own_settings(metadata: ModelMetadata) -> dict[str, Any]:
    """Return what is written under a key of our own; nothing for masked language models."""
    kept = {name: value for name, value in metadata.said().items() if name not in ELSEWHERE}
    return {} if metadata.task == "mlm" else {OWN: {"task": metadata.task, **kept}}


def read_metadata(settings: dict[str, Any], kind: Kind, path: Path, **told: object) -> ModelMetadata:
    """Return the metadata under our own key, where we have written the folder, and what transformers' keys have `told`.

    Raises `UserError` for a value that cannot be one.
    """
    own = settings.get(OWN)
    if not isinstance(own, dict) or own.get("task") not in TASKS[kind]:
        own = {"task": TASKS[kind][0]}
    own = {name: value for name, value in own.items() if name not in ELSEWHERE}
    return ModelMetadata.read(own["task"], own | told, path, "Export the model again")


def label_settings(model: Classifier, metadata: ModelMetadata) -> dict[str, Any]:
    """Return the settings of a class for sequence or token classification."""
    return {
        "id2label": {str(number): label for number, label in enumerate(model.labels)},
        "label2id": {label: number for number, label in enumerate(model.labels)},
        "classifier_dropout": model.head.dropout,
        **({"problem_type": PROBLEMS[metadata.problem or "single"]} if model.of == "text" else {}),
    }


def read_labels(settings: dict[str, Any], kind: Kind, path: Path) -> dict[str, Any]:
    """Return "labels" and, of texts, "problem"; where config.json is silent as transformers has it."""
    if (count := settings.get("num_labels", 2)) not in LABELS:
        raise UserError(f"{path}: num_labels {count!r} is out of range. Give {LABELS}.")
    named = settings.get("id2label") or {str(number): f"LABEL_{number}" for number in range(count)}
    if not isinstance(named, dict):
        raise UserError(f"{path}: id2label {named!r} is no object. Give each number a label")
    try:
        labels = [str(named[str(number)]) for number in range(len(named))]
    except (KeyError, TypeError):
        raise UserError(f"{path}: id2label does not name 0 to {len(named) - 1}. Give each label a number") from None
    if kind == "word":
        return {"labels": labels}
    if (pooling := settings.get("classifier_pooling", "cls")) != "cls":
        raise UserError(f"{path}: classifier_pooling {pooling!r} is not supported. Only 'cls' is")
    problems = {theirs: ours for ours, theirs in PROBLEMS.items()}
    guess = "single" if len(labels) > 1 else "regression"
    problem = settings.get("problem_type")
    if problem is not None and problem not in list(problems):
        raise UserError(f"{path}: problem_type {problem!r} is not supported. Take one of {', '.join(problems)}")
    return {"labels": labels, "problem": guess if problem is None else problems[problem]}


def decoder_settings(
    config: ResolvedConfig, layers: int, ids: Mapping[str, int | None], vocab_size: int | None,
    source_ids: Mapping[str, int | None],
) -> dict[str, Any]:  # fmt: skip
    """Return the settings of an `EncoderDecoderModel`.

    `ids` are the special tokens of targets, whose vocabulary has `vocab_size` tokens, `source_ids` of sources.
    """
    own = replace(config, num_layers=layers, vocab_size=vocab_size)
    decoder = {**ids, **bert_settings(own), "architectures": ["BertLMHeadModel"]}
    return {
        "model_type": "encoder-decoder",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "encoder": {**source_ids, **bert_settings(config), "architectures": ["BertModel"]},
        "decoder": {**decoder, "is_decoder": True, "add_cross_attention": True},
    }


def read_decoder(settings: dict[str, Any], path: Path) -> tuple[ResolvedConfig, int, int]:
    """Return the encoder's configuration, and the decoder's blocks and tokens, in which alone they may differ."""
    parts: list[Any] = [settings.get(name) or {} for name in ("encoder", "decoder")]
    for name, part in zip(("encoder", "decoder"), parts, strict=True):
        if not isinstance(part, dict) or part.get("model_type") != "bert":
            raise UserError(f"{path}: {name} is no BERT, which is not supported. Take one with model_type 'bert'")
    first, second = parts
    if not (second.get("is_decoder") and second.get("add_cross_attention")):
        raise UserError(f"{path}: the decoder has no cross-attention. Set its is_decoder and add_cross_attention")
    encoder, decoder = read_bert(first, path), read_bert({**second, "is_decoder": False}, path)
    for name, value in vars(encoder).items():
        if name not in MAY_DIFFER and "dropout" not in name and getattr(decoder, name) != value:
            raise UserError(
                f"{path}: {name} is {value} in the encoder and {getattr(decoder, name)} in the decoder, which is not "
                "supported. Only layers and vocabulary may differ"
            )
    return encoder, decoder.num_layers, decoder.vocab_size or 0


def generation_settings(
    metadata: ModelMetadata, ids: Mapping[str, int | None], never: list[int], longest: int
) -> dict[str, Any]:
    """Return `generation_config.json`: how `generate` of transformers searches as we do.

    `never` are ids that no output may contain, `longest` is the greatest number of its tokens.
    """
    chosen = metadata.generation or {}
    return {
        **{theirs: chosen[ours] for ours, theirs in GENERATION.items() if ours in chosen},
        **{name: value for name, value in ids.items() if value is not None and not name.startswith(("cls", "sep"))},
        "suppress_tokens": never,
        "max_length": longest,
    }
