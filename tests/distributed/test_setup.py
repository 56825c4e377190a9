"""What a sharded run refuses before it trains, and when it copies."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.pytorch import LightningModule

from leanbert.distributed import strategy as module
from leanbert.distributed.strategy import FullySharded
from leanbert.errors import UserError
from leanbert.trainer import Trainer


class Whole(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def test_a_weight_that_is_whole_on_each_device_is_an_error():
    strategy = FullySharded()
    strategy.connect(Whole())
    with pytest.raises(UserError, match=r"layer\.weight is not sharded \(2 in all\).* Use ddp"):
        strategy.setup(None)


def test_devices_must_make_whole_groups():
    strategy = FullySharded(replicas=2)
    strategy.parallel_devices = [torch.device("cpu")] * 3
    with pytest.raises(UserError, match=r"replicas: 3 devices cannot be divided into 2 groups"):
        strategy.setup_environment()


def test_no_group_waits_longer_than_is_set(monkeypatch):
    limited = []
    monkeypatch.setattr(module.ModelParallelStrategy, "setup_environment", lambda self: None)
    monkeypatch.setattr(FullySharded, "root_device", torch.device("cpu"))
    monkeypatch.setattr(module, "lay_out", lambda *_: SimpleNamespace(get_all_groups=lambda: ["replicate", "shard"]))
    monkeypatch.setattr(module, "limit_waiting", lambda *given: limited.append(given))
    strategy = FullySharded(replicas=2, timeout=timedelta(seconds=5))
    assert strategy._timeout == timedelta(seconds=5)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy.setup_environment()
    assert limited == [("replicate", timedelta(seconds=5)), ("shard", timedelta(seconds=5))]


def test_replicas_are_counted():
    with pytest.raises(UserError, match=r"trainer\.strategy\.replicas: 0"):
        FullySharded(replicas=0)


def test_checkpoints_are_of_a_known_kind():
    with pytest.raises(UserError, match=r"trainer\.strategy\.checkpoints: 'some' is unknown. Give whole or sharded"):
        FullySharded(checkpoints="some")


def test_copies_are_made_where_memory_is_free_twice_over(monkeypatch):
    strategy = FullySharded(checkpoints="sharded")
    monkeypatch.setattr(FullySharded, "num_processes", 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=801))
    for device, sizes in (("cuda", {100: True, 101: False}), ("cpu", {1: False})):
        monkeypatch.setattr(FullySharded, "root_device", torch.device(device))
        assert {size: strategy._may_copy(size) for size in sizes} == sizes


@pytest.mark.parametrize(("name", "replicas"), [("fsdp", 1), ("hsdp", "nodes")])
def test_strategies_have_names(name, replicas):
    trainer = Trainer(strategy=name, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, FullySharded)
    assert trainer.strategy.replicas == replicas
