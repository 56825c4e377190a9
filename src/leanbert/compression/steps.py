"""Steps that make a trained model smaller: what each is called, what it may follow, and how it is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from leanbert.compression.low_rank import make_embedding_low_rank, make_low_rank, second_moments, token_counts
from leanbert.compression.onnx.quantization import SCHEMES, Scheme
from leanbert.compression.pruning import apply_masks, in_fours, make_masks, prunable
from leanbert.compression.structured import prune_structured, remove_blocks, sizes_kept
from leanbert.errors import UserError, under
from leanbert.models.base import EncoderModel
from leanbert.ranges import COUNT, Range

Calibrate = Callable[[EncoderModel], None]
"""Runs a model on real batches, for a step that looks at what happens inside."""

Apply = Callable[[EncoderModel, str, Calibrate], None]

TRAIN, QUANTIZE, PRUNING = "train", "quantize", "pruning"
TWO_OF_FOUR = "2:4"


@dataclass(frozen=True)
class Technique:
    """What a step of one name does; its values are a fraction, or one of some words."""

    text: str
    apply: Apply
    """Changes the model in place."""
    callback: tuple[str, Callable[[str], dict[str, Any]]] | None = None
    """The callback that does the same in a run of `fit`, and its arguments; None: the step cannot be trained."""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step, written as `name=value`: a fraction, of `train` optimizer steps, of `quantize` the scheme."""

    name: str
    value: str

    def __str__(self) -> str:
        """Return it as it is written."""
        return f"{self.name}={self.value}"

    @property
    def slug(self) -> str:
        """A part of the name of a folder."""
        return self.value if self.name == QUANTIZE else f"{self.name}-{self.value.replace(':', 'of')}"


def _remove_blocks(model: EncoderModel, fraction: str, calibrate: Calibrate) -> None:
    with under(f"blocks={fraction}"):
        remove_blocks(model, float(fraction))


def _remove_structures(model: EncoderModel, fraction: str, calibrate: Calibrate) -> None:
    with under(f"structured_pruning={fraction}"):
        heads, neurons = sizes_kept(model.config, float(fraction), float(fraction))
    prune_structured(model, heads, neurons)


def _remove_weights(model: EncoderModel, fraction: str, calibrate: Calibrate) -> None:
    if fraction == TWO_OF_FOUR:
        if not (weights := in_fours(prunable(model))):
            raise UserError(f"pruning={fraction}: of this model no matrix has inputs in fours. Give a fraction")
        apply_masks(weights, make_masks(weights, 0.5, "2:4"))
    else:
        weights = prunable(model, include_embeddings=True)
        apply_masks(weights, make_masks(weights, float(fraction), "global"))


def _pruning_settings(fraction: str) -> dict[str, Any]:
    if fraction == TWO_OF_FOUR:
        return {"final_sparsity": 0.5, "scope": TWO_OF_FOUR}
    return {"final_sparsity": float(fraction), "include_embeddings": True}


def _factorise(model: EncoderModel, energy: str, calibrate: Calibrate) -> None:
    with second_moments(model) as moments:
        calibrate(model)
    make_low_rank(model, float(energy), moments)


def _factorise_embedding(model: EncoderModel, energy: str, calibrate: Calibrate) -> None:
    with token_counts(model) as counts:
        calibrate(model)
    make_embedding_low_rank(model, float(energy), counts)


TECHNIQUES = {
    "blocks": Technique(
        "fraction of the blocks that leave", _remove_blocks,
        ("StructuredPruning", lambda fraction: {"blocks": float(fraction)}),
    ),
    "structured_pruning": Technique(
        "fraction of attention heads and feed-forward neurons that leave", _remove_structures,
        ("StructuredPruning", lambda fraction: {"heads": float(fraction), "neurons": float(fraction)}),
    ),
    PRUNING: Technique(
        "fraction of all weights that become zero, the smallest; or 2:4, two of each four neighbours", _remove_weights,
        ("MagnitudePruning", _pruning_settings), (TWO_OF_FOUR,),
    ),
    "low_rank": Technique("fraction of the outputs' energy that two thin matrices keep of each large one", _factorise),
    "low_rank_embedding": Technique(
        "fraction of the energy that two thin matrices keep of the token embedding", _factorise_embedding
    ),
}  # fmt: skip
"""Steps that change the model, in the order in which they may follow each other: a layer that was made of two factors
has no rows that belong to heads."""

FRACTION = Range(above=0, below=1)

_TRAINED = tuple(name for name, technique in TECHNIQUES.items() if technique.callback)
ORDER = (*_TRAINED, TRAIN, *(name for name in TECHNIQUES if name not in _TRAINED), QUANTIZE)
"""Of all steps. Training makes good what those before it have cost. Quantized weights cannot be changed any more."""


def parse_steps(texts: Sequence[str]) -> list[Step]:
    """Read steps. Raises `UserError` for what is none, for values out of range and for an order that cannot be."""
    order = list(ORDER)
    steps: list[Step] = []
    for text in texts:
        name, _, value = text.partition("=")
        if name not in order:
            raise UserError(f"steps: {text!r} is none. Give {', '.join(f'{each}=VALUE' for each in order)}")
        if name == QUANTIZE:
            if value not in SCHEMES:
                raise UserError(f"steps: {text!r}. Give {QUANTIZE}={f' or {QUANTIZE}='.join(SCHEMES)}")
        elif name == TRAIN:
            if not value.isdecimal() or int(value) not in COUNT:
                raise UserError(f"steps: {text!r} needs a whole number from 1: optimizer steps")
        elif value not in TECHNIQUES[name].words and ((number := _number(value)) is None or number not in FRACTION):
            raise UserError(f"steps: {text!r} needs {FRACTION}: {TECHNIQUES[name].text}")
        for before in steps:
            if before.name == PRUNING and name.startswith("low_rank"):
                raise UserError(f"steps: {text} after {before} would fill the zeros again. Leave one of them out")
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
            TECHNIQUES[step.name].apply(model, step.value, calibrate)
    return scheme


def callbacks_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the callbacks, as in a configuration, that do in a run of `fit` what these steps do."""
    found: dict[str, dict[str, Any]] = {}
    for step in steps:
        callback = TECHNIQUES[step.name].callback
        assert callback is not None  # only such steps come before training
        name, settings = callback
        start = {"heads": 0.0, "neurons": 0.0} if name == "StructuredPruning" else {}
        found[name] = {**found.get(name, start), **settings(step.value)}
    return [{"class_path": name, "init_args": settings} for name, settings in found.items()]


def split_at_training(steps: Sequence[Step]) -> tuple[Sequence[Step], int, Sequence[Step]]:
    """Return the steps before training, its optimizer steps (0: there is none), and those after it."""
    names = [step.name for step in steps]
    if TRAIN not in names:
        return [], 0, steps
    place = names.index(TRAIN)
    return steps[:place], int(steps[place].value), steps[place + 1 :]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
