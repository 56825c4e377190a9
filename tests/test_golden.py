"""Losses and planned peaks are those that were recorded; `python -m tests.golden.record --check` compares all, exactly.

Another processor sums in another order: losses of 20 steps in float32 may differ in the fourth digit, and with 4-bit
state or masks that depend on a comparison by more.
"""

import json
import random

import pytest

from leanbert.cli.app import quiet_libraries
from tests.golden import record

LOSSES, PEAKS = (json.loads(path.read_text(encoding="utf-8")) for path in (record.LOSSES, record.PEAKS))
SAMPLE = [
    *((task, "plain") for task in record.TASKS),
    *(("mlm", overlay) for overlay in ("accumulation", "chunked_head", "layer_major", "optimizer_in_backward")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    quiet_libraries()
    folder = tmp_path_factory.mktemp("golden")
    record.write_files(folder)
    return folder


def test_everything_is_recorded():
    assert LOSSES.keys() == {f"{task} {overlay}" for task, overlay in record.RUNS}
    assert PEAKS.keys() == {" ".join(plan) for plan in record.PLANS}
    assert len(record.PLANS) >= 30


@pytest.mark.parametrize(("task", "overlay"), SAMPLE)
def test_losses(folder, task, overlay):
    recorded = LOSSES[f"{task} {overlay}"]
    assert len(recorded) == 20
    assert record.losses(folder, task, overlay) == pytest.approx(recorded, rel=2e-3)


@pytest.mark.parametrize("plan", random.Random(0).sample(record.PLANS, 6), ids=" ".join)
def test_planned_peaks(folder, plan):
    assert record.peaks(folder, *plan) == PEAKS[" ".join(plan)]
