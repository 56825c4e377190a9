"""The largest micro-batch that fits a budget, for a grid of model sizes and sequence lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import yaml

from leanbert.errors import UserError
from leanbert.planning import overlays
from leanbert.planning.device import Target
from leanbert.planning.predict import Prediction, predict
from leanbert.planning.run_settings import RunSettings
from leanbert.planning.search import largest_that_fits
from leanbert.settings import find_shipped

SIZES = ("mini", "small", "base", "large")
AXES = ("size", "max_length")
MOST = 2**16
"""Micro-batch above which none is looked for."""


@dataclass(frozen=True)
class Cell:
    """A model at a sequence length: the largest micro-batch that fits, 0 if a single sequence does not.

    `prediction` and `needs_bytes` are of a step of two such micro-batches (of one sequence each if none fits).
    """

    size: str
    max_length: int
    micro_batch: int
    prediction: Prediction
    needs_bytes: int


def parse_sweep(words: list[str], settings: RunSettings) -> tuple[list[str], list[int]]:
    """Return sizes and lengths of `size=mini,base` and `max_length=128,512`; what is not given is that of the settings.

    Raises UserError for an unknown axis or value.
    """
    given: dict[str, list[str]] = {}
    for word in words:
        axis, _, values = word.partition("=")
        if axis not in AXES or not values:
            raise UserError(f"sweep: {word!r}: give size=mini,base,large, max_length=128,512, or both.")
        given[axis] = values.split(",")
    sizes = given.get("size", ["given"])
    for size in sizes:
        if size not in (*SIZES, "given"):
            raise UserError(f"sweep: size {size!r} is unknown. Choose from {', '.join(SIZES)}.")
    lengths = given.get("max_length", [str(settings.data.hparams["max_length"])])
    for length in lengths:
        if not length.isdigit() or int(length) < 8:
            raise UserError(f"sweep: max_length {length!r}: give numbers of at least 8.")
    return sizes, [int(length) for length in lengths]


def with_size(settings: RunSettings, size: str) -> RunSettings:
    """Return the settings with the dimensions of `configs/size/SIZE.yaml`; `given` keeps those that are there."""
    if size == "given":
        return settings
    _, path = find_shipped(["--config", f"configs/size/{size}.yaml"])
    with open(path, encoding="utf-8") as file:
        dimensions = yaml.safe_load(file)["model"]["init_args"]["encoder"]
    return settings.with_encoder(**dimensions)


def sweep(
    settings: RunSettings,
    target: Target,
    budget_bytes: int,
    sizes: list[str],
    lengths: list[int],
    progress: Callable[[list[tuple[str, int]]], Iterable[tuple[str, int]]] = iter,
) -> list[Cell]:
    """Return the cells of the grid, by size, then by length.

    Args:
        settings: The configuration; its own micro-batch, if it has one, gives way.
        target: The device.
        budget_bytes: What the run may need.
        sizes: Names in `configs/size/`, or `given`.
        lengths: Values of `data.max_length`.
        progress: Wraps the list of cells while it is worked through.

    """
    pairs = [(size, length) for size in sizes for length in lengths]
    return [_cell(settings, target, budget_bytes, *pair) for pair in progress(pairs)]


def _cell(settings: RunSettings, target: Target, budget_bytes: int, size: str, length: int) -> Cell:
    technique = "accumulation" if settings.techniques.slice_rows is None else "layer_major"
    sized = with_size(settings, size)
    sized = sized.with_encoder(max_positions=max(length, sized.task.encoder_config.max_positions))

    def with_micro_batch(rows: int) -> RunSettings:
        found = overlays.apply(sized, overlays.read(technique, rows))
        found.data.hparams.update(max_length=length, val_batch_size=found.data.hparams["val_batch_size"] or rows)
        return replace(found, rows=2 * rows)

    @cache
    def at(rows: int) -> Cell:
        run = with_micro_batch(rows)
        prediction = predict(run)
        return Cell(
            size,
            length,
            rows,
            prediction,
            target.needs(prediction.peak_bytes, run.techniques),
        )

    rows = largest_that_fits(range(1, MOST + 1), lambda rows: at(rows).needs_bytes, budget_bytes)
    return at(rows) if rows else replace(at(1), micro_batch=0)
