"""Which layers lose most when they are quantized, and which stay in 32 bits so that a drop is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from leanbert.compression.onnx.quantization import fold, layers_of, quantize_folded
from leanbert.compression.onnx.runtime import OnnxModel, read_onnx
from leanbert.files import scratch_folder
from leanbert.tasks.tables import markdown_table

if TYPE_CHECKING:
    from leanbert.compression_report.variants import Variant

Value = Callable[[Sequence[str]], float]
"""Returns the metric of a model that is quantized but for some layers."""


@dataclass(frozen=True)
class Effect:
    """The metric of a model of which this layer alone is quantized, and by which part it is worse than in 32 bits."""

    layer: str
    metric: float
    drop: float


@dataclass(frozen=True)
class Choice:
    """Layers left in 32 bits, the drop of the metric that remains, and whether it is as asked."""

    exceptions: list[str]
    drop: float
    kept: bool

    def in_words(self) -> str:
        """Return what came of it."""
        layers = ", ".join(self.exceptions) or "all"
        if self.kept:
            return f"With {layers} in 32 bits the drop is {self.drop:.2%}"
        return f"No layers left in 32 bits keep the drop; the nearest, with {layers}, has {self.drop:.2%}"


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a variant, the most sensitive first; its metric in 32 bits; exceptions, if some were looked for."""

    variant: str
    metric: float
    effects: list[Effect]
    choice: Choice | None = None

    def in_words(self, tag: str) -> str:
        """Return a section of the report in Markdown."""
        header = ["layer", tag, "change"]
        lines = [[each.layer, f"{each.metric:.4f}", f"{-each.drop:+.2%}"] for each in self.effects]
        words = f"Each layer quantized alone; {tag} with all in 32 bits: {self.metric:.4f}."
        if self.choice is not None:
            words += f"\n\n{self.choice.in_words()}."
        return f"## Sensitivity of {self.variant}\n\n{words}\n\n{markdown_table(header, lines)}"


def relative_drop(metric: float, before: float, sign: float) -> float:
    """Return by which part a metric is worse than before; more of it is better where `sign` is -1."""
    return sign * (metric - before) / abs(before) if before else 0.0


def effects_of(layers: Sequence[str], value: Value, sign: float) -> tuple[float, list[Effect]]:
    """Return the metric in 32 bits, and what each layer does alone, the most sensitive first."""
    before = value(layers)
    effects = []
    for layer in tqdm(layers, desc="Sensitivity", leave=False, disable=None):
        metric = value([other for other in layers if other != layer])
        effects.append(Effect(layer, metric, relative_drop(metric, before, sign)))
    return before, sorted(effects, key=lambda effect: -math.inf if math.isnan(effect.drop) else -effect.drop)


def choose_exceptions(order: Sequence[str], drop: Value, most: float) -> Choice:
    """Leave the first layers of `order` in 32 bits, one more each time, until `drop` of them is `most` at most.

    One layer at least is quantized. Where nothing keeps the drop, the choice is the one that was nearest.
    """
    tried: list[Choice] = []
    for count in tqdm(range(1, len(order)), desc="Exceptions", leave=False, disable=None):
        exceptions = list(order[:count])
        found = drop(exceptions)
        tried.append(Choice(exceptions, found, kept=found <= most))
        if tried[-1].kept:
            break
    return min(tried, key=lambda choice: (not choice.kept, math.isnan(choice.drop), choice.drop))


@contextmanager
def trials(variant: Variant, judge: Callable[[OnnxModel], float]) -> Iterator[tuple[list[str], Value]]:
    """Yield the layers of a variant that are quantized, and what judges it with some of them left in 32 bits, too.

    The graphs are made once, if the variant has none; each trial takes the time of a quantization and an evaluation.
    """
    given, made = variant.row.exceptions, variant.quantized
    assert made is not None
    with scratch_folder() as scratch:
        float32, folded, trial = made.float32, scratch / "folded", scratch / "trial"
        if float32 is None:
            float32 = scratch / "float32"
            made.whole.export(float32, "onnx")
        for folder in (folded, trial):
            folder.mkdir()
        fold(float32, folded)

        def value(exceptions: Sequence[str]) -> float:
            quantize_folded(folded, trial, made.scheme, {*exceptions, *given}, made.seen)
            return judge(read_onnx(trial))

        yield [layer for layer in layers_of(folded, made.scheme) if layer not in given], value


def examine(
    variant: Variant, judge: Callable[[OnnxModel], float], original: float, sign: float, most: float | None
) -> Sensitivity:
    """Return the sensitivity of a quantized variant, and where `most` is given the exceptions that keep this drop.

    `original` is the metric that drops. Where the model in 32 bits drops more there is nothing to choose.
    """
    with trials(variant, judge) as (layers, value):
        metric, effects = effects_of(layers, value, sign)
        choice = None
        at_best = relative_drop(metric, original, sign)
        if most is not None and not at_best <= most:
            choice = Choice([], at_best, kept=False)
        elif most is not None and len(layers) > 1:
            order = [effect.layer for effect in effects]
            choice = choose_exceptions(order, lambda left: relative_drop(value(left), original, sign), most)
    return Sensitivity(variant.row.name, metric, effects, choice)
