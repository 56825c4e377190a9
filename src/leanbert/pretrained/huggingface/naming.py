"""How Hugging Face names the weights that our modules hold.

A table maps each of our names to one or more of theirs; several are rows of ours, stacked in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from leanbert.models.config import ResolvedConfig

Kind = Literal["mlm", "text", "word", "seq2seq"]
"""What a model has besides the encoder: masked language head, scores of texts or of words, decoder."""

Names = dict[str, tuple[str, ...]]

TOKEN_EMBEDDING = "encoder.embeddings.token.weight"
TARGET_EMBEDDING = "decoder.embeddings.token.weight"
HEAD_BIAS = "head.bias"
OF_VOCABULARY = (TOKEN_EMBEDDING, TARGET_EMBEDDING, HEAD_BIAS)
"""Weights with a row for each token, which are padded here and not there."""
DECODER_TOKENS = "decoder.bert.embeddings.word_embeddings.weight"
"""In an `EncoderDecoderModel` the token embedding once more, or the targets' own."""
SCORES = {"head.scores": ("classifier",)}


def bert_names(config: ResolvedConfig, kind: Kind) -> Names:
    """Table of `BertForMaskedLM`, `BertForSequenceClassification` or `BertForTokenClassification`."""
    heads = {
        "mlm": _prediction_head(""),
        "text": _parameters({"head.pooler": ("bert.pooler.dense",), **SCORES}, bias=True),
        "word": _parameters(SCORES, bias=True),
    }
    tokens: Names = {TOKEN_EMBEDDING: ("bert.embeddings.word_embeddings.weight",)}
    return tokens | _bert_trunk("encoder", "bert", config.num_layers) | heads[kind]


def encoder_decoder_names(config: ResolvedConfig, decoder_layers: int, separate: bool = False) -> Names:
    """Table of an `EncoderDecoderModel` of a `BertModel` and a `BertLMHeadModel`, with `separate` token embeddings."""
    modules: Names = {}
    for layer in range(decoder_layers):
        ours, theirs = f"decoder.blocks.{layer}", f"decoder.bert.encoder.layer.{layer}.crossattention"
        modules |= {
            f"{ours}.cross_attention.query": (f"{theirs}.self.query",),
            f"{ours}.cross_attention.key_value": (f"{theirs}.self.key", f"{theirs}.self.value"),
            f"{ours}.cross_attention.output": (f"{theirs}.output.dense",),
            f"{ours}.cross_attention_norm": (f"{theirs}.output.LayerNorm",),
        }
    tokens: Names = {TOKEN_EMBEDDING: ("encoder.embeddings.word_embeddings.weight",)}
    if separate:
        tokens[TARGET_EMBEDDING] = (DECODER_TOKENS,)
    return {
        **tokens,
        **_bert_trunk("encoder", "encoder", config.num_layers),
        **_bert_trunk("decoder", "decoder.bert", decoder_layers),
        **_parameters(modules, bias=True),
        **_prediction_head("decoder."),
    }


def modernbert_names(config: ResolvedConfig, kind: Kind) -> Names:
    """Table of `ModernBertForMaskedLM`, `ModernBertForSequenceClassification` or `ModernBertForTokenClassification`."""
    names: Names = {TOKEN_EMBEDDING: ("model.embeddings.tok_embeddings.weight",)}
    modules: Names = {
        "encoder.embeddings.norm": ("model.embeddings.norm",),
        "encoder.final_norm": ("model.final_norm",),
        "head.dense": ("head.dense",),
        "head.norm": ("head.norm",),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"encoder.blocks.{layer}", f"model.layers.{layer}"
        modules |= {
            f"{ours}.attention.qkv": (f"{theirs}.attn.Wqkv",),
            f"{ours}.attention.output": (f"{theirs}.attn.Wo",),
            f"{ours}.feed_forward.input": (f"{theirs}.mlp.Wi",),
            f"{ours}.feed_forward.output": (f"{theirs}.mlp.Wo",),
            f"{ours}.feed_forward_norm": (f"{theirs}.mlp_norm",),
        }
        if layer > 0:
            modules[f"{ours}.attention_norm"] = (f"{theirs}.attn_norm",)
    last: Names = {HEAD_BIAS: ("decoder.bias",)} if kind == "mlm" else _parameters(SCORES, bias=True)
    return names | _parameters(modules, bias=config.bias) | last


def _bert_trunk(ours: str, theirs: str, layers: int) -> Names:
    """Table of embeddings, but for the tokens', and blocks without cross-attention."""
    names: Names = {
        f"{ours}.embeddings.segment.weight": (f"{theirs}.embeddings.token_type_embeddings.weight",),
        f"{ours}.embeddings.position.weight": (f"{theirs}.embeddings.position_embeddings.weight",),
    }
    modules: Names = {f"{ours}.embeddings.norm": (f"{theirs}.embeddings.LayerNorm",)}
    for layer in range(layers):
        block, other = f"{ours}.blocks.{layer}", f"{theirs}.encoder.layer.{layer}"
        modules |= {
            f"{block}.attention.qkv": tuple(f"{other}.attention.self.{part}" for part in ("query", "key", "value")),
            f"{block}.attention.output": (f"{other}.attention.output.dense",),
            f"{block}.attention_norm": (f"{other}.attention.output.LayerNorm",),
            f"{block}.feed_forward.input": (f"{other}.intermediate.dense",),
            f"{block}.feed_forward.output": (f"{other}.output.dense",),
            f"{block}.feed_forward_norm": (f"{other}.output.LayerNorm",),
        }
    return names | _parameters(modules, bias=True)


def _prediction_head(prefix: str) -> Names:
    modules: Names = {
        "head.dense": (f"{prefix}cls.predictions.transform.dense",),
        "head.norm": (f"{prefix}cls.predictions.transform.LayerNorm",),
    }
    return {HEAD_BIAS: (f"{prefix}cls.predictions.bias",)} | _parameters(modules, bias=True)


def _parameters(modules: Mapping[str, tuple[str, ...]], *, bias: bool) -> Names:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in modules.items()
        for kind in kinds
    }
