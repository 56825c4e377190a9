"""Hugging Face's `config.json` of BERT and ModernBERT, to and from `EncoderConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanbert.errors import UserError
from leanbert.models.config import RANGES, EncoderConfig, ResolvedConfig
from leanbert.ranges import POSITIVE, Range

WINDOW = Range(least=2, most=2**24, whole=True)
GATES = {"gelu": "geglu", "silu": "swiglu"}
BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
GLOBAL, LOCAL = "full_attention", "sliding_attention"

# Settings of transformers' classes by our names, with the values that they take where config.json is silent.
BERT_FIELDS = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 3072),
    "max_positions": ("max_position_embeddings", 512),
    "type_vocab_size": ("type_vocab_size", 2),
    "dropout": ("hidden_dropout_prob", 0.1),
    "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    "norm_eps": ("layer_norm_eps", 1e-12),
}
MODERNBERT_FIELDS = {
    "vocab_size": ("vocab_size", 50368),
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 22),
    "num_heads": ("num_attention_heads", 12),
    "intermediate_size": ("intermediate_size", 1152),
    "max_positions": ("max_position_embeddings", 8192),
    "dropout": ("mlp_dropout", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
    "norm_eps": ("norm_eps", 1e-5),
}
LOCAL_ATTENTION = 128
"""Tokens of ModernBERT's window where config.json is silent."""


def read_bert(settings: dict[str, Any], path: Path) -> ResolvedConfig:
    """Read `BertConfig`; raises `UserError` for what our encoder cannot do."""
    _require(settings, path, hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
    return _resolve(_sizes(settings, BERT_FIELDS, path) | {"preset": "bert"}, path)


def bert_settings(config: ResolvedConfig) -> dict[str, Any]:
    """`config.json` of `BertForMaskedLM`, without special token ids."""
    fixed = {"model_type": "bert", "hidden_act": "gelu", "tie_word_embeddings": True}
    return fixed | {theirs: getattr(config, ours) for ours, (theirs, _) in BERT_FIELDS.items()}


def read_modernbert(settings: dict[str, Any], path: Path) -> ResolvedConfig:
    """Read `ModernBertConfig`, old and new style; raises `UserError` for what our encoder cannot do."""
    bias = settings.get("norm_bias", False)
    _require(dict.fromkeys(BIASES, False) | settings, path, **dict.fromkeys(BIASES, bias))
    _require(settings, path, decoder_bias=True, classifier_activation="gelu")
    gate = settings.get("hidden_activation", "gelu")
    if gate not in list(GATES):
        raise UserError(f"{path}: hidden_activation {gate!r} is not supported. Only {' and '.join(GATES)} are")
    sizes = _sizes(settings, MODERNBERT_FIELDS, path)
    local_every = _global_every(settings, sizes["num_layers"], path)
    window = settings.get("local_attention", LOCAL_ATTENTION)
    if local_every and window not in WINDOW:
        raise UserError(f"{path}: local_attention {window!r} is out of range. Give {WINDOW}.")
    return _resolve(
        sizes
        | {
            "preset": "modern",
            "activation": GATES[gate],
            "bias": bias,
            "rotary_theta": _theta(settings, GLOBAL, "global_rope_theta", 160_000.0, path),
            "local_rotary_theta": _theta(settings, LOCAL, "local_rope_theta", 10_000.0, path),
            "local_window": window if local_every else 0,
            "global_every": local_every,
        },
        path,
    )


def modernbert_settings(config: ResolvedConfig) -> dict[str, Any]:
    """`config.json` of `ModernBertForMaskedLM`, without special token ids."""
    theta = {GLOBAL: config.rotary_theta, LOCAL: config.local_rotary_theta}
    return {
        "model_type": "modernbert",
        **{theirs: getattr(config, ours) for ours, (theirs, _) in MODERNBERT_FIELDS.items()},
        **dict.fromkeys(BIASES, config.bias),
        "embedding_dropout": config.dropout,
        "hidden_activation": next(name for name, ours in GATES.items() if ours == config.activation),
        "classifier_activation": "gelu",
        "decoder_bias": True,
        "tie_word_embeddings": True,
        "local_attention": config.local_window or LOCAL_ATTENTION,
        "layer_types": [LOCAL if config.is_local(layer) else GLOBAL for layer in range(config.num_layers)],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": value} for kind, value in theta.items()},
    }


def _resolve(values: dict[str, Any], path: Path) -> ResolvedConfig:
    try:
        return EncoderConfig(**values).resolved()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _sizes(settings: dict[str, Any], fields: dict[str, tuple[str, float]], path: Path) -> dict[str, Any]:
    """Return the numbers of `config.json` by our names, each of them in its range."""
    values = {ours: settings.get(theirs, default) for ours, (theirs, default) in fields.items()}
    for ours, value in values.items():
        if value not in RANGES[ours]:
            raise UserError(f"{path}: {fields[ours][0]} {value!r} is out of range. Give {RANGES[ours]}.")
    return values


def _require(settings: dict[str, Any], path: Path, **ours: object) -> None:
    for name, only in ours.items():
        if (value := settings.get(name, only)) != only:
            raise UserError(f"{path}: {name} {value!r} is not supported. Only {only!r} is")


def _global_every(settings: dict[str, Any], layers: int, path: Path) -> int | None:
    """Smallest n with global attention in layers 0, n, 2n, ... and local in others; None: all are global."""
    if (kinds := settings.get("layer_types")) is None:
        if (every := settings.get("global_attn_every_n_layers", 3)) not in RANGES["global_every"]:
            allowed = RANGES["global_every"]
            raise UserError(f"{path}: global_attn_every_n_layers {every!r} is out of range. Give {allowed}.")
        return every if every > 1 and layers > 1 else None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"{path}: layer_types is no list of {layers} kinds, one for each of num_hidden_layers")
    if all(kind == GLOBAL for kind in kinds):
        return None
    for every in range(2, layers + 1):
        if kinds == [LOCAL if layer % every else GLOBAL for layer in range(layers)]:
            return every
    raise UserError(f"{path}: layer_types have no regular pattern. Global layers must be 0, n, 2n, ...")


def _theta(settings: dict[str, Any], kind: str, old_name: str, default: float, path: Path) -> float:
    every = settings.get("rope_parameters") or {}
    rope = every.get(kind) or {} if isinstance(every, dict) and every.keys() <= {GLOBAL, LOCAL} else None
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters are not those of {GLOBAL} and {LOCAL}. Give each its rope_theta")
    if settings.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise UserError(f"{path}: scaled rotary positions are not supported. Only rope_type 'default' is")
    theta = rope.get("rope_theta", settings.get(old_name, default))
    if theta not in POSITIVE:
        raise UserError(f"{path}: rope_theta {theta!r} is out of range. Give {POSITIVE}.")
    return float(theta)
