"""What an encoder is made of: sizes, and the choices that tell original BERT from the modern one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from leanbert.errors import UserError
from leanbert.ranges import POSITIVE, RATE, Range

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
    "bert": {
        **COMMON,
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
    "modern": {
        **COMMON,
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

CHOICES: dict[str, tuple[object, ...]] = {
    "preset": get_args(Preset),
    "position": get_args(Position),
    "norm_position": get_args(NormPosition),
    "activation": get_args(Activation),
    "bias": (True, False),
}
# Bounds above are far beyond any encoder there is; without them a slip of the pen is hours of building blocks.
_WIDTH, _LONG = Range(least=1, most=2**17, whole=True), Range(least=1, most=2**24, whole=True)
RANGES = {
    "num_layers": Range(least=1, most=1000, whole=True),
    **dict.fromkeys(("hidden_size", "num_heads", "head_size"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "max_positions", "global_every", "vocab_size"), _LONG),
    **dict.fromkeys(("type_vocab_size", "local_window"), Range(least=0, most=2**24, whole=True)),
    **dict.fromkeys(("dropout", "attention_dropout"), RATE),
    **dict.fromkeys(("norm_eps", "rotary_theta", "local_rotary_theta"), POSITIVE),
}
MOST_WEIGHTS = 10**11
"""Of a model: hundreds of gigabytes."""


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

    def __post_init__(self) -> None:
        """Raise `UserError` for a value that cannot be one: at once, not after the corpus is prepared."""
        for setting in fields(self):
            if (value := getattr(self, setting.name)) is not None or setting.default is not None:
                _check(setting.name, value)

    def resolved(self) -> ResolvedConfig:
        """Fill every `None` (except `vocab_size`) and check that the parts fit together.

        Raises `UserError`, naming the setting below `model.encoder`, where they do not.
        """
        values = PRESETS[self.preset] | {name: value for name, value in asdict(self).items() if value is not None}
        if self.intermediate_size is None:
            # A gated feed-forward has three matrices where the plain one has two: 8/3 keeps the parameters equal.
            wide = 4 * self.hidden_size
            values["intermediate_size"] = wide if values["activation"] == "gelu" else 2 * (wide // 3)
        if self.head_size is None:
            if self.hidden_size % self.num_heads:
                raise UserError(
                    f"{SETTING}.hidden_size: {self.hidden_size} is not divisible by num_heads {self.num_heads}. "
                    f"Choose a multiple of {self.num_heads}, or set head_size"
                )
            values["head_size"] = self.hidden_size // self.num_heads
        return ResolvedConfig(**values)


@dataclass(kw_only=True)
class ResolvedConfig(EncoderConfig):
    """An `EncoderConfig` without open choices; what the modules are built from."""

    head_size: int
    intermediate_size: int
    type_vocab_size: int
    position: Position
    norm_position: NormPosition
    activation: Activation
    bias: bool
    dropout: float
    attention_dropout: float
    norm_eps: float
    rotary_theta: float
    local_window: int
    global_every: int
    local_rotary_theta: float

    def __post_init__(self) -> None:
        """Raise `UserError` for values that do not fit together."""
        super().__post_init__()
        if self.head_size > self.hidden_size:
            raise UserError(
                f"{SETTING}.head_size: {self.head_size} is wider than hidden_size {self.hidden_size}. "
                f"At most {self.hidden_size}"
            )
        if self.position == "rotary" and self.head_size % 2:
            raise UserError(
                f"{SETTING}.num_heads: rotary positions turn pairs, but a head is {self.head_size} wide. "
                "Choose num_heads so that hidden_size / num_heads is even, or set an even head_size"
            )
        if self.position == "sinusoidal" and self.hidden_size % 2:
            raise UserError(f"{SETTING}.hidden_size: {self.hidden_size} is odd. Sines need pairs")
        width, inner = self.hidden_size, self.num_heads * self.head_size
        block = width * (4 * inner + (3 if self.gated else 2) * self.intermediate_size)
        positions = 0 if self.position == "rotary" else self.max_positions
        tables = width * ((self.vocab_size or 0) + positions + self.type_vocab_size)
        if (weights := self.num_layers * block + tables) > MOST_WEIGHTS:
            raise UserError(
                f"{SETTING}: these sizes make a model of {weights:.1e} weights. At most {MOST_WEIGHTS:.0e} are built: "
                "lower num_layers or hidden_size"
            )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies an activated half with a linear half."""
        return self.activation != "gelu"

    def is_local(self, layer: int) -> bool:
        """Whether block number `layer` attends to a window only."""
        return self.local_window > 0 and layer % self.global_every != 0

    def window(self, local: bool) -> tuple[int, int]:
        """Return how many tokens a token sees to its left and right, in global or local attention; -1: all."""
        reach = self.local_window // 2 if local else -1
        return reach, reach

    def theta(self, local: bool) -> float:
        """Return the base of rotary frequencies in global or local attention."""
        return self.local_rotary_theta if local else self.rotary_theta

    def check_length(self, max_length: int) -> None:
        """Raise `UserError` if rows of `max_length` tokens have no position in this model."""
        if max_length > self.max_positions:
            raise UserError(
                f"data.max_length: {max_length} tokens, but the model has {self.max_positions} positions. "
                f"Lower it, or raise {SETTING}.max_positions for a new model"
            )


def _check(name: str, value: object) -> None:
    if name in RANGES and value not in RANGES[name]:
        raise UserError(f"{SETTING}.{name}: {value!r} is out of range. Give {RANGES[name]}.")
    if name in CHOICES and not (isinstance(value, str | bool) and value in CHOICES[name]):
        known = ", ".join(str(choice).lower() for choice in CHOICES[name])
        raise UserError(f"{SETTING}.{name}: {value!r} is unknown. Choose from {known}")
