"""What ranks compare before they train; on processes in `tests/distributed/test_launch.py`."""

from __future__ import annotations

import pytest

from leanbert.callbacks.loop import agreement
from leanbert.callbacks.loop.agreement import compare, difference, flat
from leanbert.errors import UserError

SETTINGS = {
    "seed_everything": 0,
    "data": {"class_path": "MaskedLMData", "init_args": {"batch_size": 8, "cache_dir": "/scratch"}},
    "trainer": {"callbacks": [], "logger": {}},
}


def test_settings_have_the_names_of_the_command_line():
    assert flat(SETTINGS) == {
        "seed_everything": "0", "data.class_path": "MaskedLMData", "data.batch_size": "8", "trainer.callbacks": "[]",
        "trainer.logger": "{}",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (({"a.b": "1"}, {"a.b": "1"}, {"a.b": "2"}), "a.b: is 1 on rank 0 and 2 on rank 2."),
        (({"a": "1"}, {"a": "1", "b": "2"}), "b: is not set on rank 0 and 2 on rank 1."),
    ],
)
def test_the_first_rank_that_differs_is_named(ranks, says):
    assert difference(ranks) == f"{says} Give all ranks the same settings and files."


def test_settings_are_exchanged_where_their_digests_differ(monkeypatch):
    others = {}
    monkeypatch.setattr(agreement, "over_ranks", lambda own: [*own, others.get(type(own[0]), own[0])])
    compare({"a": "1"})
    others |= {str: "another digest", dict: {"a": "2"}}
    with pytest.raises(UserError, match="a: is 1 on rank 0 and 2 on rank 1"):
        compare({"a": "1"})
