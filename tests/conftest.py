"""One cache for all tests of a session: the embedded corpus is harvested once, the user's own cache is not touched."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

from tests import launcher

torch.set_num_threads(1)  # two files run at a time: threads that wait for each other's cores would be slower


def pytest_collection_modifyitems(items):
    """Documents come first: each runs for minutes, and as the last one it would leave the other workers idle.

    Tests that need a device are skipped, and counted, where there is none.
    """
    items.sort(key=lambda item: "test_readme" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def freeze_what_is_there():
    """Keep what is imported out of the many collections to come, as the command line does."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.getbasetemp()
    patch.setenv("XDG_CACHE_HOME", str((folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder) / "cache"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def launcher_socket(session_cache):
    """Commands of `tests/launcher.py` are answered."""
    patch = pytest.MonkeyPatch()
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket is short
        path = Path(folder) / "socket"
        with launcher.serving(path, {**os.environ, "OMP_NUM_THREADS": "1"}):
            patch.setenv(launcher.SOCKET, str(path))
            yield
    patch.undo()
