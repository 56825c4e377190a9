"""The figure of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from leanbert.measure.figures import new_figure
from leanbert.planning.sweep import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_figure(cells: Sequence[Cell], title: str) -> Figure:
    """Return the largest micro-batches as a table in colours: sizes down, sequence lengths across."""
    figure, axes = new_figure(title)
    sizes, lengths = (
        list(dict.fromkeys(values)) for values in zip(*((c.size, c.max_length) for c in cells), strict=True)
    )
    grid = np.array([cell.micro_batch for cell in cells], dtype=float).reshape(len(sizes), len(lengths))
    axes.imshow(np.log2(grid + 1), cmap="Blues", aspect="auto", vmin=0)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(sizes)), sizes)
    axes.set_xlabel("tokens a sequence")
    darkest = np.log2(grid.max() + 1)
    for (row, column), value in np.ndenumerate(grid):
        dark = np.log2(value + 1) > 0.6 * darkest
        text = f"{value:,.0f}" if value else "does not fit"
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    return figure
