"""How the command line says to a plan which devices share a model."""

import pytest
from jsonargparse import Namespace

from leanbert.cli.budget import strategy_of

SHARDS = {"class_path": "leanbert.distributed.strategy.FullySharded"}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("auto", {}),
        ("ddp", {"strategy": "ddp"}),
        ("ddp_spawn", {"strategy": "ddp"}),
        ("fsdp", {"strategy": "fsdp2"}),
        ("hsdp", {"strategy": "fsdp2", "replicas": 3}),
        (SHARDS, {"strategy": "fsdp2", "replicas": 1, "offload": False}),
        (
            {**SHARDS, "init_args": {"replicas": "nodes", "offload": True}},
            {"strategy": "fsdp2", "replicas": 3, "offload": True},
        ),
        ({"class_path": "lightning.pytorch.strategies.DDPStrategy"}, {"strategy": "ddp"}),
    ],
)
def test_a_strategy_is_planned_as_what_it_is(strategy, expected):
    settings = {"trainer": Namespace(strategy=strategy, num_nodes=1), "nodes": 3}
    assert strategy_of(settings) == expected
    if "replicas" in expected:
        again = {"trainer": Namespace(strategy=strategy, num_nodes=3), "nodes": None}
        assert strategy_of(again) == expected
