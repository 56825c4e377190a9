"""Steps that make a trained model smaller: what each is called, what it may follow, and how it is applied."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Protocol, cast

from torch import nn

from leanbert.compression.low_rank import make_embedding_low_rank, make_low_rank, second_moments, token_counts
from leanbert.compression.onnx.quantization import SCHEMES, Scheme, Seen
from leanbert.compression.pruning import PATTERNS, apply_masks, make_masks, prunable, tiled
from leanbert.compression.rounding import ROUNDINGS
from leanbert.compression.structured import (
    Importance,
    add_importance,
    prune_structured,
    remove_blocks,
    sizes_kept,
    taylor_importance,
)
from leanbert.errors import UserError, under
from leanbert.models.base import EncoderModel
from leanbert.models.packed_inputs import PackedInputs
from leanbert.ranges import COUNT, PART


class Calibrate(Protocol):
    """Runs a model on real batches, for a step that looks at what happens inside."""

    def __call__(self, model: EncoderModel, after_backward: Callable[[], object] | None = None) -> None:
        """Run forward passes and, where something comes after them, backward passes of the mean loss of each batch."""


Apply = Callable[[EncoderModel, str, Calibrate], None]

TRAIN, QUANTIZE, BLOCKS = "train", "quantize", "blocks"
LOW_RANK, LOW_RANK_EMBEDDING = "low_rank", "low_rank_embedding"
PRUNING, MOVEMENT = "pruning", "movement_pruning"
QUANTIZATION_AWARE = "quantization_aware"
"""How `train` trains: with weights rounded as the scheme that is its value will round them."""
ZEROS = (PRUNING, MOVEMENT)
"""Steps that set single weights to zero."""
TAYLOR = ":taylor"
TAYLOR_STEPS = 20
"""Of training before heads and neurons leave by their gradients."""


def _is_fraction(text: str) -> bool:
    try:
        return float(text) in PART
    except ValueError:
        return False


@dataclass(frozen=True)
class Method:
    """What a step of one name does."""

    text: str
    """What its values are."""
    apply: Apply | None
    """Changes the model in place; None: only training does it."""
    callback: tuple[str, Callable[[str], dict[str, Any]]] | None = None
    """The callback that does the same in a run of `fit`, and its arguments; None: the step cannot be trained."""
    takes: Callable[[str], bool] = _is_fraction
    """Whether a value is one of its own."""


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
        return self.value if self.name == QUANTIZE else f"{self.name}-{self.value.replace(':', '-')}"


def _remove_blocks(model: EncoderModel, fraction: str, calibrate: Calibrate) -> None:
    with under(f"blocks={fraction}"):
        remove_blocks(model, float(fraction))


def _remove_structures(model: EncoderModel, value: str, calibrate: Calibrate) -> None:
    fraction = float(value.removesuffix(TAYLOR))
    with under(f"structured_pruning={value}"):
        heads, neurons = sizes_kept(model.config, fraction, fraction)
    found: list[Importance] = []
    if value.endswith(TAYLOR):
        calibrate(model, lambda: found.append(taylor_importance(model)))
    prune_structured(model, heads, neurons, reduce(add_importance, found, None))


def _structured_settings(value: str) -> dict[str, Any]:
    fraction = float(value.removesuffix(TAYLOR))
    taylor = {"importance": "taylor", "at_step": TAYLOR_STEPS} if value.endswith(TAYLOR) else {}
    return {"heads": fraction, "neurons": fraction, **taylor}


def _remove_weights(model: EncoderModel, value: str, calibrate: Calibrate) -> None:
    settings = _magnitude_settings(value)
    scope, size = settings.get("scope", "global"), settings.get("block_size", 1)
    weights = tiled(prunable(model, settings.get("include_embeddings", False)), scope, size)
    if not weights:
        raise UserError(f"pruning={value}: no matrix of this model consists of such groups. Give a fraction")
    apply_masks(weights, make_masks(weights, settings["final_sparsity"], scope, size))


def _zeros_settings(value: str) -> dict[str, Any]:
    if value in PATTERNS:
        return {"final_sparsity": 0.5, "scope": value}
    fraction, _, size = value.partition(":")
    return {"final_sparsity": float(fraction), **({"block_size": int(size)} if size else {})}


def _magnitude_settings(value: str) -> dict[str, Any]:
    """Return the settings; single weights leave embeddings too, groups of them are for products."""
    return {**_zeros_settings(value), **({"include_embeddings": True} if _is_fraction(value) else {})}


def _are_zeros(value: str) -> bool:
    fraction, colon, size = value.partition(":")
    whole = re.fullmatch(r"[1-9][0-9]{0,5}", size) and size != "1"
    return value in PATTERNS or (_is_fraction(fraction) and bool(whole or not colon))


def _factorise(model: EncoderModel, energy: str, calibrate: Calibrate) -> None:
    with second_moments(model) as moments:
        calibrate(model)
    make_low_rank(model, float(energy), moments)


def _factorise_embedding(model: EncoderModel, energy: str, calibrate: Calibrate) -> None:
    with token_counts(model) as counts:
        calibrate(model)
    make_embedding_low_rank(model, float(energy), counts)


GROUPS = "; 0.8:8, of blocks of 8 x 8 in linear layers; 2:4 or 4:8 of neighbours there"

METHODS = {
    BLOCKS: Method(
        "fraction of the blocks that leave", _remove_blocks,
        ("StructuredPruning", lambda fraction: {"blocks": float(fraction)}),
    ),
    "structured_pruning": Method(
        "fraction of attention heads and feed-forward neurons that leave; 0.25:taylor, by the gradients of the loss",
        _remove_structures, ("StructuredPruning", _structured_settings),
        lambda value: _is_fraction(value.removesuffix(TAYLOR)),
    ),
    PRUNING: Method(
        f"fraction of all weights that become zero, the smallest{GROUPS}", _remove_weights,
        ("MagnitudePruning", _magnitude_settings), _are_zeros,
    ),
    MOVEMENT: Method(
        f"fraction of linear layers' weights that become zero, as training moves them there{GROUPS}", None,
        ("MovementPruning", _zeros_settings), _are_zeros,
    ),
    QUANTIZATION_AWARE: Method(
        "the scheme", None, ("QuantizationAwareTraining", lambda scheme: {"scheme": scheme}), ROUNDINGS.__contains__
    ),
    LOW_RANK: Method("fraction of the outputs' energy that two thin matrices keep of each large one", _factorise),
    LOW_RANK_EMBEDDING: Method(
        "fraction of the energy that two thin matrices keep of the token embedding", _factorise_embedding
    ),
}  # fmt: skip
"""Steps that change the model, in the order in which they may follow each other: a layer that was made of two factors
has no rows that belong to heads."""

_TRAINED = tuple(name for name, method in METHODS.items() if method.callback)
ORDER = (*_TRAINED, TRAIN, *(name for name in METHODS if name not in _TRAINED), QUANTIZE)
"""Of all steps. Training makes good what those before it have cost. Quantized weights cannot be changed any more."""


def parse_steps(texts: Sequence[str]) -> list[Step]:
    """Read steps. Raises `UserError` for what is none, for values out of range and for an order that cannot be."""
    steps: list[Step] = []
    for text in texts:
        name, _, value = text.partition("=")
        _check_value(text, name, value)
        for before in steps:
            factors = name in (LOW_RANK, LOW_RANK_EMBEDDING)
            if before.name in ZEROS and (factors or name in ZEROS) and before.name != name:
                reason = "would fill the zeros again" if factors else "sets weights to zero a second time"
                raise UserError(f"steps: {text} after {before} {reason}. Leave one of them out")
            if ORDER.index(before.name) >= ORDER.index(name):
                reason = "is there twice" if before.name == name else f"cannot follow {before}"
                raise UserError(f"steps: {text} {reason}. Put them in the order {', '.join(ORDER)}")
        steps.append(Step(name, value))
    _check_training(steps)
    return steps


def _check_training(steps: Sequence[Step]) -> None:
    """Raise `UserError` for steps that need another training than there is, or learn what then does not come."""
    _, trained, _ = split_at_training(steps)
    names = {step.name for step in steps}
    for step in steps:
        if step.name == MOVEMENT and not trained:
            raise UserError(f"steps: {step} looks at how training moves weights. Add {TRAIN}=STEPS, or give {PRUNING}")
        late = trained <= TAYLOR_STEPS or BLOCKS in names
        if step.value.endswith(TAYLOR) and trained and late:
            reason = f"is measured in the first {TAYLOR_STEPS} steps of training, with all blocks"
            raise UserError(f"steps: {step} {reason}. Train longer and without {BLOCKS}, or leave {TAYLOR} out")
        if step.name == QUANTIZATION_AWARE:
            if not trained:
                raise UserError(f"steps: {step} is how {TRAIN} trains. Add {TRAIN}=STEPS after it")
            if factors := sorted(names & {LOW_RANK, LOW_RANK_EMBEDDING}):
                raise UserError(f"steps: {factors[0]} makes other matrices than {step} has rounded. Leave one out")
            if steps[-1] != Step(QUANTIZE, step.value):
                raise UserError(f"steps: {step} needs the same at the end. Add {QUANTIZE}={step.value}")


def _check_value(text: str, name: str, value: str) -> None:
    if name not in ORDER:
        raise UserError(f"steps: {text!r} is none. Give {', '.join(f'{each}=VALUE' for each in ORDER)}")
    if name in (QUANTIZE, QUANTIZATION_AWARE):
        if value not in (schemes := SCHEMES if name == QUANTIZE else tuple(ROUNDINGS)):
            raise UserError(f"steps: {text!r}. Give {name}={f' or {name}='.join(schemes)}")
    elif name == TRAIN:
        if not re.fullmatch("[0-9]{1,15}", value) or int(value) not in COUNT:
            raise UserError(f"steps: {text!r} needs a whole number from 1: optimizer steps")
    elif not METHODS[name].takes(value):
        raise UserError(f"steps: {text!r} needs {PART}: {METHODS[name].text}")


def variants_of(steps: Sequence[Step]) -> list[Sequence[Step]]:
    """Return the lists that make a variant each: each step with those before it, if training need not come first."""
    lists = [steps[: count + 1] for count in range(len(steps))]
    return [steps for steps in lists if steps[-1].name not in METHODS or METHODS[steps[-1].name].apply]


def apply_steps(model: EncoderModel, steps: Sequence[Step], calibrate: Calibrate) -> Scheme | None:
    """Change the model in place and return how its weights are to be quantized; None: they are not.

    Raises `UserError` for a step that has no effect on this model.
    """
    scheme = None
    for step in steps:
        if step.name == QUANTIZE:
            scheme = cast(Scheme, step.value)
        else:
            apply = METHODS[step.name].apply
            assert apply is not None  # parse_steps has put training after it
            apply(model, step.value, calibrate)
    return scheme


def inputs_seen(model: EncoderModel, calibrate: Calibrate) -> list[Seen]:
    """Return what a model reads of real batches: of each what every stack of blocks does."""
    found: list[list[PackedInputs]] = [[] for _ in model.stacks]

    def collect(into: list[PackedInputs], _: nn.Module, given: tuple[Any, ...]) -> None:
        into.append(given[0].unpacked().inputs)

    with ExitStack() as hooks:
        for stack, into in zip(model.stacks, found, strict=True):
            hooks.enter_context(stack.register_forward_pre_hook(partial(collect, into)))
        calibrate(model)
    return list(zip(*found, strict=True))


def as_callbacks(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Return the callbacks, as in a configuration, that do in a run of `fit` what these steps do."""
    found: dict[str, dict[str, Any]] = {}
    for step in steps:
        callback = METHODS[step.name].callback
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
