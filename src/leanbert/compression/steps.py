"""Steps that make a trained model smaller: what each is called, what it may follow, and how it is applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from leanbert.compression.low_rank import make_low_rank, second_moments
from leanbert.compression.onnx.quantization import SCHEMES, STATIC, Scheme
from leanbert.compression.pruning import apply_masks, in_fours, make_masks, prunable
from leanbert.compression.rounding import ROUNDINGS
from leanbert.compression.structured import prune_structured, remove_blocks, sizes_kept
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.packed_inputs import PackedInputs
from leanbert.ranges import COUNT, Range

Calibrate = Callable[[EncoderModel], None]
"""Runs a model on real batches, for a step that looks at what happens inside."""

Apply = Callable[[EncoderModel, str, Calibrate], None]

TRAIN, QUANTIZE, PRUNING = "train", "quantize", "pruning"
QUANTIZATION_AWARE = "quantization_aware"
"""How `train` trains: with weights rounded as the scheme that is its value will round them."""
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
    """One step, written as `name=value`: a fraction, of `train` optimizer steps, of those that round a scheme."""

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
    try:
        remove_blocks(model, float(fraction))
    except UserError as error:
        raise UserError(str(error).replace("StructuredPruning.blocks", f"blocks={fraction}")) from None


def _remove_structures(model: EncoderModel, fraction: str, calibrate: Calibrate) -> None:
    try:
        heads, neurons = sizes_kept(model.config, float(fraction), float(fraction))
    except UserError:
        raise UserError(f"structured_pruning={fraction}: of this model it removes nothing. Give a larger one") from None
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
}  # fmt: skip
"""Steps that change the model, in the order in which they may follow each other: a layer that was made of two factors
has no rows that belong to heads."""

FRACTION = Range(above=0, below=1)

ORDER = (*(name for name in TECHNIQUES if TECHNIQUES[name].callback), QUANTIZATION_AWARE, TRAIN, "low_rank", QUANTIZE)
"""Of all steps. Training makes good what those before it have cost. Quantized weights cannot be changed any more."""


def parse_steps(texts: Sequence[str]) -> list[Step]:
    """Read steps. Raises `UserError` for what is none, for values out of range and for an order that cannot be."""
    order = list(ORDER)
    steps: list[Step] = []
    for text in texts:
        name, _, value = text.partition("=")
        if name not in order:
            raise UserError(f"steps: {text!r} is none. Give {', '.join(f'{each}=VALUE' for each in order)}")
        if name in (QUANTIZE, QUANTIZATION_AWARE):
            if value not in (schemes := SCHEMES if name == QUANTIZE else tuple(ROUNDINGS)):
                raise UserError(f"steps: {text!r}. Give {name}={f' or {name}='.join(schemes)}")
        elif name == TRAIN:
            if not value.isdecimal() or int(value) not in COUNT:
                raise UserError(f"steps: {text!r} needs a whole number from 1: optimizer steps")
        elif value not in TECHNIQUES[name].words and ((number := _number(value)) is None or number not in FRACTION):
            raise UserError(f"steps: {text!r} needs {FRACTION}: {TECHNIQUES[name].text}")
        for before in steps:
            if (before.name, name) == (PRUNING, "low_rank"):
                raise UserError(f"steps: {text} after {before} would fill the zeros again. Leave one of them out")
            if order.index(before.name) >= order.index(name):
                reason = "is there twice" if before.name == name else f"cannot follow {before}"
                raise UserError(f"steps: {text} {reason}. Put them in the order {', '.join(order)}")
        steps.append(Step(name, value))
    _check_awareness(steps)
    return steps


def _check_awareness(steps: Sequence[Step]) -> None:
    """Raise `UserError` where training would learn to do with a rounding that does not come."""
    names = [step.name for step in steps]
    if QUANTIZATION_AWARE not in names:
        return
    step = steps[names.index(QUANTIZATION_AWARE)]
    if TRAIN not in names:
        raise UserError(f"steps: {step} is how {TRAIN} trains. Add {TRAIN}=STEPS after it")
    if "low_rank" in names:
        raise UserError(f"steps: low_rank makes other matrices than {step} has rounded. Leave one of them out")
    if steps[-1] != Step(QUANTIZE, step.value):
        raise UserError(f"steps: {step} is of no use without the same at the end. Add {QUANTIZE}={step.value}")


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


def inputs_seen(model: EncoderModel, calibrate: Calibrate) -> list[PackedInputs]:
    """Return what a model reads of real batches, as rows of one document each. Raises `UserError` for a decoder."""
    found: list[PackedInputs] = []
    if model.task == "seq2seq":
        raise UserError(f"{QUANTIZE}={STATIC}: what a decoder reads is not recorded. Give {QUANTIZE}=int8")
    handle = model.encoder.register_forward_pre_hook(lambda _, given: found.append(given[0].unpacked().inputs))
    try:
        calibrate(model)
    finally:
        handle.remove()
    return found


def reported(steps: Sequence[Step]) -> list[list[Step]]:
    """Return what is made and reported: each step with those before it, but how to train without the training."""
    return [[*steps[: count + 1]] for count, step in enumerate(steps) if step.name != QUANTIZATION_AWARE]


def callbacks_of(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the callbacks, as in a configuration, that do in a run of `fit` what these steps do."""
    found: dict[str, dict[str, Any]] = {}
    for step in steps:
        if step.name == QUANTIZATION_AWARE:
            found["QuantizationAwareTraining"] = {"scheme": step.value}
            continue
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
