"""Steps that make a trained model smaller: what each is called, what it may follow, and how it is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from leanbert.compression.low_rank import make_low_rank, second_moments
from leanbert.compression.onnx.quantization import SCHEMES, Scheme
from leanbert.compression.structured import prune_structured, sizes_kept
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.ranges import Range

Calibrate = Callable[[EncoderModel], None]
"""Runs a model on real batches, for a step that looks at what happens inside."""

Apply = Callable[[EncoderModel, float, Calibrate], None]

QUANTIZE = "quantize"


@dataclass(frozen=True)
class Technique:
    """What a step of one name does; `fraction` are the values that it takes, `apply` changes the model in place."""

    text: str
    fraction: Range
    apply: Apply


@dataclass(frozen=True)
class Step:
    """One step, written as `name=value`: a fraction, or of `quantize` the scheme."""

    name: str
    value: str

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.name}={self.value}"

    @property
    def slug(self) -> str:
        """A part of the name of a folder."""
        return self.value if self.name == QUANTIZE else f"{self.name}-{self.value}"


def _remove_structures(model: EncoderModel, fraction: float, calibrate: Calibrate) -> None:
    try:
        heads, neurons = sizes_kept(model.config, fraction, fraction)
    except UserError:
        raise UserError(f"structured_pruning={fraction}: of this model it removes nothing. Give a larger one") from None
    prune_structured(model, heads, neurons)


def _factorise(model: EncoderModel, energy: float, calibrate: Calibrate) -> None:
    with second_moments(model) as moments:
        calibrate(model)
    make_low_rank(model, energy, moments)


TECHNIQUES = {
    "structured_pruning": Technique(
        "fraction of attention heads and feed-forward neurons that leave", Range(above=0, below=1), _remove_structures
    ),
    "low_rank": Technique(
        "fraction of the outputs' energy that two thin matrices keep of each large one", Range(above=0, below=1),
        _factorise,
    ),
}  # fmt: skip
"""Steps that change the model, in the order in which they may follow each other: a layer that was made of two factors
has no rows that belong to heads. `quantize` comes after all, for its weights cannot be changed any more."""


def parse_steps(texts: Sequence[str]) -> list[Step]:
    """Read steps. Raises `UserError` for what is none, for values out of range and for an order that cannot be."""
    order = [*TECHNIQUES, QUANTIZE]
    steps: list[Step] = []
    for text in texts:
        name, _, value = text.partition("=")
        if name not in order:
            raise UserError(f"steps: {text!r} is none. Give {', '.join(f'{each}=VALUE' for each in order)}")
        if name == QUANTIZE:
            if value not in SCHEMES:
                raise UserError(f"steps: {text!r}. Give {QUANTIZE}={f' or {QUANTIZE}='.join(SCHEMES)}")
        elif (number := _number(value)) is None or number not in TECHNIQUES[name].fraction:
            raise UserError(f"steps: {text!r} needs {TECHNIQUES[name].fraction}: {TECHNIQUES[name].text}")
        for before in steps:
            if order.index(before.name) >= order.index(name):
                reason = "is there twice" if before.name == name else f"cannot follow {before}"
                raise UserError(f"steps: {text} {reason}. Put them in the order {', '.join(order)}")
        steps.append(Step(name, value))
    return steps


def apply_steps(model: EncoderModel, steps: Sequence[Step], calibrate: Calibrate) -> Scheme | None:
    """Change the model in place and return how its weights are to be quantized; None: they are not.

    Raises `UserError` for a step that has no effect on this model.
    """
    scheme = None
    for step in steps:
        if step.name == QUANTIZE:
            scheme = cast(Scheme, step.value)
        else:
            TECHNIQUES[step.name].apply(model, float(step.value), calibrate)
    return scheme


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
