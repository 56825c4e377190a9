"""A model as it is on disk."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from leanbert.errors import UserError
from leanbert.models.config import RANGES, EncoderConfig, ResolvedConfig
from leanbert.ranges import SHARE

Problem = Literal["single", "multi", "regression"]
"""One label of several, any number of them, or numbers."""
Mark = Literal["tokens", "segments"]
"""How a predicate is marked: between two separators, or by segment 1."""
Start = Literal["encoder", "shared", "random"]
"""Where the decoder's weights come from: copies of the encoder's, the encoder's own (trained together), or chance."""

StateDict = dict[str, Tensor]


class LazyWeights(UserDict[str, Any]):
    """Weights by name: tensors, mapped from a file, or functions that make one when it is asked for."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight; one that is made is made anew each time."""
        weight = self.data[name]
        return weight if isinstance(weight, Tensor) else weight()


@dataclass(frozen=True)
class ModelMetadata:
    """What a stored model says of itself besides the encoder's settings and the weights; None: nothing.

    Values are primitives.
    """

    task: str
    max_length: int | None = None
    """Tokens of the rows that it was trained on."""
    max_target_length: int | None = None
    """Tokens of its targets; None: as many as of sources, if their number is known."""
    labels: list[str] | None = None
    problem: Problem | None = None
    texts: int | None = None
    """Texts of each example: 2 of pairs."""
    threshold: float | None = None
    """Probability from which a label is given, where there may be several."""
    mark: Mark | None = None
    find_predicates: bool | None = None
    decoder_layers: int | None = None
    decoder_start: Start | None = None
    target_vocab_size: int | None = None
    """Tokens of targets that have a tokenizer of their own."""
    copy: bool | None = None
    """Whether tokens may be copied from the source."""
    generation: dict[str, Any] | None = None
    """Fields of `GenerationConfig`."""

    @classmethod
    def read(cls, task: str, values: Mapping[str, Any], source: Path, fix: str) -> ModelMetadata:
        """Make it of what the file `source` says; names that are not known here are left out.

        Raises `UserError`, which ends with `fix`, for a value that cannot be one.
        """
        known = {name: values[name] for name in ALLOWED if values.get(name) is not None}
        for name, value in known.items():
            allowed = ALLOWED[name]
            if not (isinstance(value, allowed) if isinstance(allowed, type) else value in allowed):
                raise UserError(f"{source}: leanbert.{name} {value!r} is no such value. {fix}")
        return cls(task, **known)

    def said(self) -> dict[str, Any]:
        """Return by name what it says besides the task."""
        return {name: value for name in ALLOWED if (value := getattr(self, name)) is not None}


ALLOWED: dict[str, Any] = {
    "max_length": RANGES["max_positions"],
    "max_target_length": RANGES["max_positions"],
    "labels": list,
    "problem": get_args(Problem),
    "texts": (1, 2),
    "threshold": SHARE,
    "mark": get_args(Mark),
    "find_predicates": bool,
    "decoder_layers": RANGES["num_layers"],
    "decoder_start": get_args(Start),
    "target_vocab_size": RANGES["vocab_size"],
    "copy": bool,
    "generation": dict,
}
"""What values can be, by name: a type, or what holds them."""


def describe(config: ResolvedConfig, metadata: ModelMetadata) -> dict[str, Any]:
    """Return what a file says of its model, as `read_description` reads it: primitives by name."""
    return {"encoder": asdict(config), "task": metadata.task, **metadata.said()}


def read_description(said: Mapping[str, Any], source: Path, fix: str) -> tuple[ResolvedConfig, ModelMetadata]:
    """Return the encoder's settings and the metadata that the file `source` has of `describe`.

    Raises `UserError`, which ends with `fix`, for what is missing or cannot be.
    """
    try:
        config, task = EncoderConfig(**said["encoder"]).resolved(), said["task"]
    except (KeyError, TypeError, UserError):
        raise UserError(f"{source}: does not say what model it is. {fix}") from None
    return config, ModelMetadata.read(task, said, source, fix)


class Stored(NamedTuple):
    """A model at `source`: the encoder's settings and its metadata. `read_weights` gives the weights by our names."""

    config: ResolvedConfig
    metadata: ModelMetadata
    source: Path
    read_weights: Callable[[], Mapping[str, Tensor]]
