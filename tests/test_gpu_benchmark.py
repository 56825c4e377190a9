"""`benchmarks/gpu.py` without a GPU: all of it in a dry run, and how a part ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"card": 11, "synchronisations": 2, "equality": 6, "plan": 2, "memory": 3}
"""Rows by part."""
STUB = """
import pathlib, sys, time
folder = pathlib.Path(next(word for word in sys.argv if word.startswith("--folder="))[9:])
(folder / "card.jsonl").write_text('["one", "1"]\\n["two", ')
if {seconds}:
    time.sleep({seconds})
sys.exit("no such luck")
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


@pytest.mark.parametrize(("seconds", "ending"), [(60, "Cut after 2 s."), (0, "Failed after 0 s: no such luck")])
def test_a_part_that_does_not_end_well_keeps_its_whole_rows(gpu, monkeypatch, tmp_path, seconds, ending):
    stub = tmp_path / "stub.py"
    stub.write_text(STUB.format(seconds=seconds))
    monkeypatch.setattr(gpu, "__file__", str(stub))
    body = gpu.run_part("card", 2.0, tmp_path, dry=True)
    assert body == f"|  |  |\n| --- | --- |\n| one | 1 |\n\n{ending}"


def test_no_part_begins_after_the_end(gpu, tmp_path):
    assert gpu.run_part("card", 0.0, tmp_path, dry=True) == "Not run: the time was up."


@pytest.mark.slow
def test_a_dry_run_fills_its_sections(gpu, tmp_path):
    """All but the parts that take minutes: `tests`, `budgets`, `profile` and `speed`."""
    report = tmp_path / "gpu.md"
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", f"--report={report}", "--parts", *COUNTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    sections = dict(re.findall(r"<!-- gpu-(\w+) -->\n(.*?)<!-- /gpu-\1 -->", report.read_text(), re.DOTALL))
    rows = {name: [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
            for name, text in sections.items()}  # fmt: skip
    assert all(re.search(r"^Took \d+ s\.$", text, re.MULTILINE) for text in sections.values()), report.read_text()
    assert {name: len(found) for name, found in rows.items()} == COUNTS
    assert [row[1] for row in rows["synchronisations"]] == ["5", "5"]  # a CPU looks whether each step is finite
    assert all(row[4] == "+0.0e+00" for row in rows["equality"])
    assert all(abs(float(row[-1].split()[0])) < 3 for row in rows["plan"])
