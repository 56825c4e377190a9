"""How the command line says to a plan which devices share a model."""

import pytest
from jsonargparse import Namespace

from leanbert.cli.budget import count_devices, planned_target, strategy_of
from leanbert.errors import UserError

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


@pytest.mark.parametrize(
    ("devices", "count"), [(2, 2), ("2", 2), ([0, 3], 2), ("0,3", 2), ("0,", 1), ("auto", 1), (-1, 1), ("-1", 1)]
)
def test_devices_of_the_trainer_are_counted_as_a_launcher_counts_them(devices, count):
    settings = {"trainer": Namespace(devices=devices, num_nodes=3), "devices": None, "nodes": None}
    assert count_devices({**settings, "data": {"init_args": {"batch_size": 6}}}) == 3 * count


@pytest.mark.parametrize(("devices", "nodes", "named"), [(0, None, "--devices: 0"), (2, -1, "--nodes: -1")])
def test_devices_and_machines_are_counted(devices, nodes, named):
    with pytest.raises(UserError, match=named):
        count_devices({"trainer": Namespace(devices=1, num_nodes=1), "devices": devices, "nodes": nodes})


@pytest.mark.parametrize(
    ("target", "device", "measure", "planned"),
    [
        ("auto", None, False, "mps"),
        ("auto", "rtx4090", False, "cuda"),
        ("auto", "rtx4090", True, "mps"),  # where steps are timed
        ("cpu", "rtx4090", False, "cpu"),
        ("cuda", None, False, "cuda"),
    ],
)
def test_who_names_a_device_plans_for_its_kind(target, device, measure, planned):
    assert planned_target({"target": target, "device": device, "measure": measure}, "mps") == planned
