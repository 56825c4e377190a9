import subprocess
import sys

import pytest
import torch

from leanbert.measure.counters import device_bytes

TOUCH = """
import torch
from leanbert.measure.counters import peak_rss_bytes, rss_bytes
size = 64 * 2**20
before = rss_bytes()
block = torch.ones(size, dtype=torch.uint8)
assert 0.9 * size < rss_bytes() - before < 1.5 * size
assert peak_rss_bytes() >= before + 0.9 * size
assert block.sum() == size
"""


def test_resident_memory_counts_touched_bytes():
    """In a process of its own: other tests let the allocator keep what they freed."""
    subprocess.run([sys.executable, "-c", TOUCH], check=True)


def test_the_cpu_has_no_device_counters():
    assert device_bytes(torch.device("cpu")) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not pass a peak on")
def test_the_peak_is_not_that_of_the_process_which_started_this_one():
    ballast = bytearray(300 * 2**20)
    code = "from leanbert.measure.counters import peak_rss_bytes, rss_bytes; print(peak_rss_bytes() - rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 150 * 2**20
    del ballast
