"""Which variant is recommended, and what is made again how."""

import json
import shlex

import pytest

from leanbert.compression.steps import parse_steps
from leanbert.compression_report.command import LADDER, TRAINED
from leanbert.compression_report.report import Row, answer_of, mark_front
from leanbert.compression_report.request import Limits

MIB = 2**20


def row(name, steps, size_mib, milliseconds, drop):
    return Row(name, steps, "onnxruntime", metrics={"val/f1": 0.5}, drop=drop, size_bytes=size_mib * MIB,
               latency_p50=milliseconds / 1e3)  # fmt: skip


ROWS = [
    row("original", [], 20, 9.0, 0.0), row("onnx", [], 20, 7.0, 0.0), row("onnxruntime-int8", [], 6, 3.0, 0.003),
    row("int8", ["quantize=int8"], 5, 2.0, 0.01),
    row("int4", ["quantize=int4"], 3, 8.0, 0.02),
    row("both", ["low_rank=0.9", "quantize=int8"], 4, 1.5, 0.2),
]  # fmt: skip


def test_every_list_of_the_ladder_can_be():
    for texts in (*LADDER, *([text.format(9) for text in texts] for texts in TRAINED)):
        assert [str(step) for step in parse_steps(texts)] == list(texts)


def test_without_limits_the_front_is_named():
    mark_front(ROWS)
    words, fits = answer_of(ROWS, Limits(), "val/f1", "again", False)
    assert (words, fits) == (
        "No other variant beats onnx, onnxruntime-int8, int8, int4, both. "
        "Give --max_size, --max_latency or --max_drop to choose", True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "name"),
    [(Limits(size_bytes=5 * MIB, drop=0.05), "int8"), (Limits(size_bytes=3 * MIB), "int4"), (Limits(drop=0.5), "both")],
)
def test_the_fastest_that_keeps_the_limits_is_chosen_with_its_command(limits, name):
    words, fits = answer_of(ROWS, limits, "val/f1", "train.py compress --output x", False)
    assert fits
    assert words.startswith(f"Take {name}: ")
    given = shlex.split(words.partition("Made again by: ")[2])
    steps = next(each.steps for each in ROWS if each.name == name)
    assert given[:-1] == ["train.py", "compress", "--output", "x", "--steps"]
    assert json.loads(given[-1]) == steps


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(6 * MIB, drop=0.005), "onnxruntime-int8, onnxruntime: 6.0 MiB, 3.00 ms a row, val/f1 -0.30%."),
        (Limits(drop=0.001), "onnx, onnxruntime: 20.0 MiB, 7.00 ms a row, val/f1 +0.00%."),
    ],
)
def test_what_stands_beside_the_variants_is_chosen_too_without_steps_to_make_it(limits, words):
    assert answer_of(ROWS, limits, "val/f1", "again", False) == (f"Take {words}", True)


def test_where_none_does_the_nearest_is_named_and_what_training_would_do():
    limits = Limits(size_bytes=4 * MIB, drop=0.01)
    words, fits = answer_of(ROWS, limits, "val/f1", "again", False)
    assert not fits
    assert words.startswith("compress: no variant keeps the limits. The nearest, int8, has 5.0 MiB of 4.0 MiB. Raise")
    assert words.endswith("Raise a limit, or let smaller ones be trained by distillation: --search true")
    words, _ = answer_of(ROWS, limits, "val/f1", "again", True)
    assert words.endswith("Raise a limit, or train longer (trainer.max_steps)")
