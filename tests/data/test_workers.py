from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from leanbert.data import workers
from leanbert.data.workers import available_cpus, process_pool

PROGRAM = """
import time
import torch
from leanbert.data.workers import process_pool
from tests.data.test_workers import has_torch
with process_pool() as pool:
    print(pool.submit(has_torch).result(), flush=True)
    time.sleep(60)
"""


def has_torch() -> bool:
    return "torch" in sys.modules


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 64), ("250000 100000", 3), ("1000 100000", 1)])
def test_the_containers_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    inner = workers._cgroup_quota
    monkeypatch.setattr(workers, "_cgroup_quota", lambda _: inner(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert available_cpus() == expected


def test_version_one_control_groups(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert workers._cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    assert workers._cgroup_quota(tmp_path) == float("inf")


def test_results_come_back() -> None:
    with process_pool() as pool:
        assert list(pool.map(abs, [-1, 2, -3])) == [1, 2, 3]


def test_workers_are_light_and_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "False\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert children
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
