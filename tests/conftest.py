"""One cache for all tests of a session: the embedded corpus is harvested once, the user's own cache is not touched."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
