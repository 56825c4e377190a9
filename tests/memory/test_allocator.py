import subprocess
import sys

import pytest

TOUCH = """
import resource, sys, torch
from leanbert.memory.allocator import keep_freed_pages
if sys.argv[1] == "keep":
    assert keep_freed_pages()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 * 2**20)
before = faults()
for _ in range(10):
    torch.ones(16 * 2**20)  # 64 MiB, freed at once
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_pages_are_used_again():
    def page_faults(mode):
        return int(subprocess.run([sys.executable, "-c", TOUCH, mode], capture_output=True, check=True).stdout)

    assert page_faults("keep") < 0.1 * page_faults("default")


RETURNED = """
import sys, torch
from leanbert.memory.allocator import keep_freed_pages, return_freed_pages
from leanbert.measure.counters import rss_bytes
assert (return_freed_pages if sys.argv[1] == "return" else keep_freed_pages)()
before = rss_bytes()
blocks = [torch.ones(2**20) for _ in range(64)]  # 4 MiB each
keep = [torch.ones(2**10) for _ in range(64)]
del blocks
print((rss_bytes() - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_pages_are_kept_or_returned():
    left = {}
    for mode in ("return", "keep"):
        done = subprocess.run([sys.executable, "-c", RETURNED, mode], capture_output=True, text=True, check=True)
        left[mode] = float(done.stdout)
    assert left["return"] < 16
    assert left["keep"] > 200
