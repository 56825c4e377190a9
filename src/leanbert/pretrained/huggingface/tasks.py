"""What Hugging Face's `config.json` says of a task: labels, the decoder, and what only LeanBERT knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanbert.errors import UserError
from leanbert.models.classifier import Classifier
from leanbert.models.config import RANGES, ResolvedConfig
from leanbert.pretrained.architectures import TASKS
from leanbert.pretrained.huggingface.config import bert_settings, read_bert
from leanbert.pretrained.huggingface.naming import Kind
from leanbert.ranges import SHARE, Range

OWN = "leanbert"
"""Key of what no class of transformers asks for: the task, and how it is answered."""
ELSEWHERE = ("labels", "problem", "decoder_layers", "decoder_start")
"""Facts that the folder says in transformers' own terms."""
MAY_DIFFER = ("num_layers", "vocab_size")
"""Settings of a decoder that need not be the encoder's."""
PROBLEMS = {
    "single": "single_label_classification",
    "multi": "multi_label_classification",
    "regression": "regression",
}
LABELS = Range(least=1, most=10**6, whole=True)
FACTS: dict[str, Callable[[Any], bool]] = {
    "max_length": lambda value: value in RANGES["max_positions"],
    "target_vocab_size": lambda value: value in RANGES["vocab_size"],
    "threshold": lambda value: value in SHARE,
    "copy": lambda value: value is False,  # no class of transformers copies
    "mark": lambda value: value in ("tokens", "segments"),
    "generation": lambda value: isinstance(value, dict),
}
"""What facts can be, by name."""
GENERATION = {
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "sample": "do_sample",
}


def own_settings(task: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written under a key of our own; nothing for masked language models."""
    kept = {name: value for name, value in facts.items() if name not in ELSEWHERE}
    return {} if task == "mlm" else {OWN: {"task": task, **kept}}


def read_own(settings: dict[str, Any], kind: Kind, path: Path) -> tuple[str, dict[str, Any]]:
    """Return the task and its facts; those of a folder that we have not written are what its class says.

    Raises `UserError` for a fact that cannot be one.
    """
    kept = settings.get(OWN)
    if not isinstance(kept, dict) or kept.get("task") not in TASKS[kind]:
        return TASKS[kind][0], {}
    facts = {name: value for name, value in kept.items() if name not in ("task", *ELSEWHERE)}
    for name, value in facts.items():
        if not FACTS.get(name, lambda _: True)(value):
            raise UserError(f"{path}: {OWN}.{name} {value!r} is no such value. Export the model again")
    return kept["task"], facts


def label_settings(model: Classifier, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a class for sequence or token classification."""
    return {
        "id2label": {str(number): label for number, label in enumerate(model.labels)},
        "label2id": {label: number for number, label in enumerate(model.labels)},
        "classifier_dropout": model.head.dropout,
        **({"problem_type": PROBLEMS[facts.get("problem", "single")]} if model.of == "text" else {}),
    }


def read_labels(settings: dict[str, Any], kind: Kind, path: Path) -> dict[str, Any]:
    """Return the facts "labels" and, of texts, "problem"; where config.json is silent as transformers has it."""
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

    `ids` are those of special tokens of targets, whose vocabulary has `vocab_size` tokens, `source_ids` of sources.
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
    facts: Mapping[str, Any], ids: Mapping[str, int | None], never: list[int], longest: int
) -> dict[str, Any]:
    """Return `generation_config.json`: how `generate` of transformers searches as we do.

    `never` are ids that no output may contain, `longest` is the greatest number of its tokens.
    """
    chosen = facts.get("generation", {})
    return {
        **{theirs: chosen[ours] for ours, theirs in GENERATION.items() if ours in chosen},
        **{name: value for name, value in ids.items() if value is not None and not name.startswith(("cls", "sep"))},
        "suppress_tokens": never,
        "max_length": longest,
    }
