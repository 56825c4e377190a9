"""The front and the limits by hand."""

import pytest

from leanbert.compression_report.report import Row, as_json, as_table, mark_front, pareto_figure
from leanbert.compression_report.request import Limits


def row(name, size, latency, drop, **more):
    return Row(name, ["quantize=int8"], "onnxruntime", metrics={"val/f1": 0.5}, drop=drop, size_bytes=size,
               latency_p50=latency, **more)  # fmt: skip


ROWS = [
    row("all", 100, 0.010, 0.0),
    row("small", 25, 0.004, 0.02),
    row("worse", 25, 0.005, 0.02),
    row("fast", 30, 0.002, 0.3),
]


def test_the_front_has_what_no_other_beats():
    rows = [*ROWS, row("twin", 25, 0.004, 0.02)]
    mark_front(rows)
    assert [each.name for each in rows if each.on_front] == ["all", "small", "fast", "twin"]


def test_limits_that_are_missed_are_said():
    limits = Limits(25, 0.004, 0.01)
    assert ROWS[1].misses(limits) == {"a drop of 2.0% of 1.0%": 2.0}
    assert ROWS[3].misses(limits) == pytest.approx({"30 B of 25 B": 1.2, "a drop of 30.0% of 1.0%": 30.0})
    assert ROWS[0].misses(limits) == {"100 B of 25 B": 4.0, "10.0 of 4 ms": 2.5}
    assert ROWS[0].misses(Limits()) == {}


def test_the_table_has_a_line_for_each_row_and_tests_only_where_there_are_some():
    mark_front(ROWS)
    table = as_table(ROWS, "val/f1")
    assert "test/f1" not in table
    assert len(table.splitlines()) == 2 + 4
    assert "| small \\* | onnxruntime | 0.5000 | -2.00% | 0 | 0 | 25 B |" in table
    assert "| all \\* | onnxruntime | 0.5000 | +0.00% | 0 | 0 | 100 B |" in table
    tested = as_table(
        [row("a", 1, 1, 0.0) for _ in range(1)] + [Row("b", [], "x", metrics={"test/f1": 0.25})], "val/f1"
    )
    assert tested.splitlines()[0].count("test/f1") == 1
    assert "0.2500" in tested


def test_programs_get_all_of_it():
    answer = as_json(ROWS, "val/f1", "a machine", "Take small")
    assert (answer["metric"], answer["answer"], len(answer["variants"])) == ("val/f1", "Take small", 4)
    assert answer["variants"][1]["latency_p50"] == 0.004


def test_the_picture_numbers_each_variant_and_names_the_numbers():
    figure = pareto_figure(ROWS, "val/f1")
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]
    (legend,) = figure.legends
    names = [row.name for row in ROWS]
    assert [text.get_text() for text in legend.texts] == [f"{i}  {name}" for i, name in enumerate(names, 1)]
    sizes = {"size_bytes": 9, "latency_p50": 1.0}
    model = [Row("original", [], name, metrics={"val/f1": 0.5}, **sizes) for name in ("float32", "bfloat16")]
    (legend,) = pareto_figure(model, "val/f1").legends
    assert [text.get_text() for text in legend.texts] == ["1  original, float32", "2  original, bfloat16"]
