import sys

import pytest

from leanbert.measure.figures import COLOURS, breakdown_figure, pixels, timeline_figure
from leanbert.measure.timeline import CATEGORIES
from leanbert.units import MIB
from tests.measure.test_timeline import example


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_timeline_names_phases_and_shows_the_peak():
    figure = timeline_figure(example(), "Live tensors during step 2")
    axes = figure.axes[0]
    assert axes.get_title() == "Live tensors during step 2"
    assert axes.get_ylabel() == "live tensors (MiB)"
    assert texts(figure) == ["forward", "backward", "optimizer"]
    assert [label.split(" ")[0] for label in legend(figure)] == [*CATEGORIES, "peak"]
    (marker,) = [line for line in axes.lines if line.get_marker() == "v"]
    assert marker.get_ydata()[0] == pytest.approx(900 / MIB)


def test_the_breakdown_stacks_to_the_peak_of_each_phase():
    figure = breakdown_figure(example().categories_by_phase, "title")
    ends = {}
    for bar in figure.axes[0].patches:
        ends[round(bar.get_y(), 3)] = max(ends.get(round(bar.get_y(), 3), 0), bar.get_x() + bar.get_width())
    assert sorted(round(end * MIB) for end in ends.values()) == [540, 800, 900]
    assert legend(figure) == list(CATEGORIES)


def test_pixels_are_drawn_without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    image = pixels(timeline_figure(example(), "title"))
    assert image.shape == (625, 1000, 3)
    colour = tuple(int(COLOURS["parameters"][place : place + 2], 16) for place in (1, 3, 5))
    assert (image == colour).all(axis=-1).sum() > 10_000  # the band that is there all the time
