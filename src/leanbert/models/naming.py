"""How Hugging Face names the weights that our modules hold.

A table maps each of our names to one or more of theirs; several are rows of ours, stacked in this order.
"""

from __future__ import annotations

from leanbert.models.config import ResolvedConfig

Names = dict[str, tuple[str, ...]]

TOKEN_EMBEDDING = "encoder.embeddings.token.weight"
HEAD_BIAS = "head.bias"


def bert_names(config: ResolvedConfig) -> Names:
    """Table for `BertForMaskedLM`."""
    names: Names = {
        TOKEN_EMBEDDING: ("bert.embeddings.word_embeddings.weight",),
        "encoder.embeddings.segment.weight": ("bert.embeddings.token_type_embeddings.weight",),
        "encoder.embeddings.position.weight": ("bert.embeddings.position_embeddings.weight",),
        HEAD_BIAS: ("cls.predictions.bias",),
    }
    modules: Names = {
        "encoder.embeddings.norm": ("bert.embeddings.LayerNorm",),
        "head.dense": ("cls.predictions.transform.dense",),
        "head.norm": ("cls.predictions.transform.LayerNorm",),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"encoder.blocks.{layer}", f"bert.encoder.layer.{layer}"
        modules |= {
            f"{ours}.attention.qkv": tuple(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")),
            f"{ours}.attention.output": (f"{theirs}.attention.output.dense",),
            f"{ours}.attention_norm": (f"{theirs}.attention.output.LayerNorm",),
            f"{ours}.feed_forward.input": (f"{theirs}.intermediate.dense",),
            f"{ours}.feed_forward.output": (f"{theirs}.output.dense",),
            f"{ours}.feed_forward_norm": (f"{theirs}.output.LayerNorm",),
        }
    return names | _parameters(modules, bias=True)


def modernbert_names(config: ResolvedConfig) -> Names:
    """Table for `ModernBertForMaskedLM`."""
    names: Names = {
        TOKEN_EMBEDDING: ("model.embeddings.tok_embeddings.weight",),
        HEAD_BIAS: ("decoder.bias",),
    }
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
    return names | _parameters(modules, bias=config.bias)


def _parameters(modules: Names, *, bias: bool) -> Names:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {
        f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs)
        for ours, theirs in modules.items()
        for kind in kinds
    }
