"""Figures of where a step's memory goes. matplotlib is imported when one is drawn, and never its pyplot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from leanbert.measure.timeline import CATEGORIES, PHASES, Timeline
from leanbert.units import MIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito 2008, told apart with any colour vision
COLOURS = {
    "parameters": "#0072B2",
    "optimizer": "#E69F00",
    "gradients": "#009E73",
    "activations": "#56B4E9",
    "other": "#999999",
}
NARROWEST_LABEL = 0.06  # share of the axis below which a phase's name would not fit


def timeline_figure(timeline: Timeline, title: str) -> Figure:
    """Return live MiB over the operations of one step, stacked by category, with its phases and its peak."""
    figure, axes = new_figure(title)
    x, totals = timeline.operations, timeline.totals / MIB
    bands = [timeline.live[:, column] / MIB for column in range(len(CATEGORIES))]
    labels = [f"{name} ({size / MIB:,.1f} at the peak)" for name, size in timeline.by_category.items()]
    axes.stackplot(x, bands, labels=labels, colors=[COLOURS[name] for name in CATEGORIES], step="post", linewidth=0)
    top, end = 1.18 * totals.max(), max(1, int(x[-1]))
    for index, (name, first, last) in enumerate(timeline.spans):
        if index:
            axes.axvline(first, color="black", linewidth=0.6, linestyle=":")
        if last - first >= NARROWEST_LABEL * end:
            axes.text((first + last) / 2, 0.985 * top, name, ha="center", va="top", fontsize=10)
    peak = int(totals.argmax())
    axes.plot(x[peak], totals[peak], "v", color="#D55E00", label=f"peak {totals[peak]:,.1f} MiB")
    axes.set(xlabel="operations", ylabel="live tensors (MiB)", xlim=(0, end), ylim=(0, top))
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def breakdown_figure(phases: Mapping[str, Mapping[str, int]], title: str) -> Figure:
    """Return bars of MiB by category at the peak of each phase.

    Args:
        phases: Bytes by category, by phase.
        title: What stands above.

    """
    figure, axes = new_figure(title)
    names = [name for name in PHASES if name in phases]
    left, widest = np.zeros(len(names)), max(sum(categories.values()) for categories in phases.values()) / MIB
    for category in CATEGORIES:
        width = np.array([phases[name].get(category, 0) / MIB for name in names])
        bars = axes.barh(names, width, left=left, color=COLOURS[category], label=category)
        wide = [f"{value:,.1f}" if value > 0.06 * widest else "" for value in width]
        axes.bar_label(bars, wide, label_type="center", fontsize=9)
        left += width
    for name, total in zip(names, left, strict=True):
        axes.text(total, name, f" {total:,.1f}", va="center", fontweight="bold")
    axes.invert_yaxis()
    axes.set(xlabel="live tensors at the peak of the phase (MiB)", xlim=(0, 1.12 * left.max()))
    figure.legend(loc="outside lower center", ncols=len(CATEGORIES), frameon=False)
    return figure


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return the figure as [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def new_figure(title: str, columns: int = 1) -> tuple[Figure, Any]:
    """Return an empty figure and its axes, of several columns a list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if columns == 1 else 6 * columns, 5), dpi=125, layout="constrained")
    found: Any = figure.subplots(1, columns)
    (found.set_title if columns == 1 else figure.suptitle)(title)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found
