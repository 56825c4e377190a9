"""What an encoder is made of: sizes, and the choices that tell original BERT from the modern one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from leanbert.errors import UserError

Preset = Literal["bert", "modern"]
Position = Literal["learned", "sinusoidal", "rotary"]
NormPosition = Literal["post", "pre"]
Activation = Literal["gelu", "geglu", "swiglu"]

SETTING = "model.encoder"

COMMON: dict[str, Any] = {
    "rotary_theta": 10_000.0,
    "local_window": 0,
    "global_every": 3,
    "local_rotary_theta": 10_000.0,
}
PRESETS: dict[Preset, dict[str, Any]] = {
    # Devlin et al. 2019, arXiv 1810.04805
    "bert": COMMON
    | {
        "type_vocab_size": 2,
        "position": "learned",
        "norm_position": "post",
        "activation": "gelu",
        "bias": True,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "norm_eps": 1e-12,
    },
    # Warner et al. 2024, arXiv 2412.13663, with global attention in every layer
    "modern": COMMON
    | {
        "type_vocab_size": 0,
        "position": "rotary",
        "norm_position": "pre",
        "activation": "geglu",
        "bias": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "norm_eps": 1e-5,
    },
}


@dataclass
class EncoderConfig:
    """Sizes and kinds of an encoder's parts; where `None` is allowed it means "what the preset says".

    Holds primitives only, so that `dataclasses.asdict` of it can be stored in a checkpoint and read back.
    """

    preset: Preset = "modern"
    """Family of defaults: original BERT, or ModernBERT (rotary, pre-norm, gated, no biases)."""
    num_layers: int = 4
    """Number of blocks."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_heads: int = 4
    """Attention heads per block; divides hidden_size, unless head_size is set."""
    head_size: int | None = None
    """Width of a head; by default hidden_size / num_heads. Set, it allows any number of heads (as after pruning)."""
    intermediate_size: int | None = None
    """Width inside the feed-forward; by default 4 x hidden_size, or 8/3 x hidden_size where it is gated."""
    max_positions: int = 512
    """Longest row, in tokens."""
    type_vocab_size: int | None = None
    """Kinds of segment; 0: no segment embedding. bert: 2, modern: 0."""
    position: Position | None = None
    """How positions enter: a learned table, sines and cosines, or rotated queries and keys."""
    norm_position: NormPosition | None = None
    """LayerNorm after the residual sum (post) or at the entry of each branch (pre)."""
    activation: Activation | None = None
    """Feed-forward: plain GELU, or gated by GELU or SiLU."""
    bias: bool | None = None
    """Biases in linear layers and norms (the vocabulary's output always has one)."""
    dropout: float | None = None
    """Dropout of the embeddings and of each branch's output. bert: 0.1, modern: 0."""
    attention_dropout: float | None = None
    """Dropout of the attention probabilities. bert: 0.1, modern: 0."""
    norm_eps: float | None = None
    """Added to the variance in LayerNorm."""
    rotary_theta: float | None = None
    """Longest wavelength of the rotary embedding, over 2 pi, in layers with global attention."""
    local_window: int | None = None
    """Tokens seen in a layer with local attention, half of them on either side; 0: no such layers."""
    global_every: int | None = None
    """With local_window: layers 0, n, 2n, ... have global attention, the others local."""
    local_rotary_theta: float | None = None
    """rotary_theta of the layers with local attention."""
    vocab_size: int | None = None
    """Rows of the vocabulary; follows the tokenizer, leave it out."""

    def resolved(self) -> ResolvedConfig:
        """Fill every `None` (except `vocab_size`) and check that the parts fit together.

        Raises `UserError`, naming the setting below `model.encoder`, where they do not.
        """
        if self.preset not in PRESETS:
            raise UserError(f"{SETTING}.preset: {self.preset!r} is unknown. Choose from {', '.join(PRESETS)}")
        values = asdict(self)
        for name, value in PRESETS[self.preset].items():
            if values[name] is None:
                values[name] = value
        if values["intermediate_size"] is None:
            values["intermediate_size"] = _default_intermediate(self.hidden_size, values["activation"])
        if values["head_size"] is None:
            values["head_size"] = _default_head_size(self.hidden_size, self.num_heads)
        config = ResolvedConfig(**values)
        _check(config)
        return config


@dataclass
class ResolvedConfig(EncoderConfig):
    """An `EncoderConfig` without open choices; what the modules are built from."""

    head_size: int = field(kw_only=True)
    intermediate_size: int = field(kw_only=True)
    type_vocab_size: int = field(kw_only=True)
    position: Position = field(kw_only=True)
    norm_position: NormPosition = field(kw_only=True)
    activation: Activation = field(kw_only=True)
    bias: bool = field(kw_only=True)
    dropout: float = field(kw_only=True)
    attention_dropout: float = field(kw_only=True)
    norm_eps: float = field(kw_only=True)
    rotary_theta: float = field(kw_only=True)
    local_window: int = field(kw_only=True)
    global_every: int = field(kw_only=True)
    local_rotary_theta: float = field(kw_only=True)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies an activated half with a linear half."""
        return self.activation != "gelu"

    def is_local(self, layer: int) -> bool:
        """Whether block number `layer` attends to a window only."""
        return self.local_window > 0 and layer % self.global_every != 0

    def with_vocabulary(self, vocab_size: int) -> ResolvedConfig:
        """Return a copy for a tokenizer of `vocab_size` tokens."""
        return replace(self, vocab_size=vocab_size)

    def check_length(self, max_length: int) -> None:
        """Raise `UserError` if rows of `max_length` tokens have no position in this model."""
        if max_length > self.max_positions:
            raise UserError(
                f"data.max_length: {max_length} tokens, but the model has {self.max_positions} positions. "
                f"Lower it, or raise {SETTING}.max_positions for a new model"
            )


def _default_intermediate(hidden_size: int, activation: Activation) -> int:
    # A gated feed-forward has three matrices where the plain one has two: 8/3 keeps the parameters equal.
    return 4 * hidden_size if activation == "gelu" else 2 * (4 * hidden_size // 3)


def _default_head_size(hidden_size: int, num_heads: int) -> int:
    if num_heads < 1:
        return 1  # refused with the other sizes
    if hidden_size % num_heads:
        raise UserError(
            f"{SETTING}.hidden_size: {hidden_size} is not divisible by num_heads {num_heads}. "
            f"Choose a multiple of {num_heads}, or set head_size"
        )
    return hidden_size // num_heads


def _check(config: ResolvedConfig) -> None:
    _check_choices(config)
    _check_ranges(config)
    if config.head_size > config.hidden_size:
        raise UserError(
            f"{SETTING}.head_size: {config.head_size} is wider than hidden_size {config.hidden_size}. "
            f"At most {config.hidden_size}"
        )
    if config.position == "rotary" and config.head_size % 2:
        raise UserError(
            f"{SETTING}.num_heads: rotary positions turn pairs, but a head is {config.head_size} wide. "
            "Choose num_heads so that hidden_size / num_heads is even, or set an even head_size"
        )
    if config.position == "sinusoidal" and config.hidden_size % 2:
        raise UserError(f"{SETTING}.hidden_size: {config.hidden_size} is odd. Sines need pairs")


def _check_choices(config: ResolvedConfig) -> None:
    choices = {
        "position": ("learned", "sinusoidal", "rotary"),
        "norm_position": ("post", "pre"),
        "activation": ("gelu", "geglu", "swiglu"),
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise UserError(f"{SETTING}.{name}: {getattr(config, name)!r} is unknown. Choose from {', '.join(known)}")


def _check_ranges(config: ResolvedConfig) -> None:
    least = {"type_vocab_size": 0, "local_window": 0}
    widths = ("hidden_size", "num_heads", "head_size", "intermediate_size")
    for name, lowest in (least | dict.fromkeys((*widths, "num_layers", "max_positions", "global_every"), 1)).items():
        if getattr(config, name) < lowest:
            raise UserError(f"{SETTING}.{name}: {getattr(config, name)} is too small. At least {lowest}")
    for name in ("dropout", "attention_dropout"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UserError(f"{SETTING}.{name}: {getattr(config, name)} is no rate. Choose from 0 to below 1")
    for name in ("norm_eps", "rotary_theta", "local_rotary_theta"):
        if getattr(config, name) <= 0.0:
            raise UserError(f"{SETTING}.{name}: {getattr(config, name)} is not positive")
