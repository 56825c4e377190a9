"""Shards in host memory on a GPU: the device has less than the parameters, and the losses are the same."""

from __future__ import annotations

import gc
import json

import pytest
import torch
import torch.distributed as dist

from leanbert.distributed.parallelize import parallelize
from leanbert.distributed.sharding import lay_out
from leanbert.memory.step import backpropagate_all_but_last
from leanbert.optim.build import OptimizerConfig, build_optimizer
from tests.corpus import write_corpus
from tests.cuda.test_fit import ON_CUDA
from tests.distributed.ranks import free_port
from tests.tiny import PlainTask, tiny_model, unequal_batch
from tests.training import fit, scalars

pytestmark = pytest.mark.cuda

ON_GPU = (*ON_CUDA, "--trainer.devices=1")


def strategy(**settings):
    return f"--trainer.strategy={json.dumps({'class_path': 'FullySharded', 'init_args': settings})}"


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "train.txt")
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def mesh(monkeypatch):
    """One GPU."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield lay_out("cuda", 1, 1)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw8bit"])
def test_the_device_has_far_less_than_the_parameters(mesh, name):
    """It has one block of 24 at a time, and its gradients as they came and as they go."""
    torch.cuda.empty_cache()
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sizes = {"num_layers": 24, "hidden_size": 512, "num_heads": 8}
    model = parallelize(lambda: tiny_model(torch.float32, **sizes), lambda _: None, mesh, offload=True)
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    for micro_batch in (None, 4):
        last, _ = backpropagate_all_but_last(
            PlainTask(model), unequal_batch().to("cuda"), micro_batch=micro_batch, sum_over_ranks=lambda value: value
        )
        last.backward()
        assert {parameter.grad.device.type for parameter in model.parameters()} == {"cpu"}
        optimizer.step()
        optimizer.zero_grad()
    parameters = list(model.parameters())
    assert all(each.to_local().is_pinned() for each in parameters)
    size = sum(each.numel() * each.element_size() for each in parameters)
    assert torch.cuda.max_memory_allocated() - before < 0.4 * size
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 0.05 * size


def losses(cli):
    return [value for _, value in sorted(scalars(cli)["train/loss"].items())]


def test_losses_in_bfloat16_are_those_without(folder):
    here, there = (
        losses(fit(folder, *ON_GPU, strategy(offload=each), "--trainer.precision=bf16-mixed")) for each in (False, True)
    )
    assert there == pytest.approx(here, rel=1e-2)


def test_losses_are_those_without_and_a_run_goes_on_with_and_without(folder):
    """Adam's update is rounded otherwise on the host."""
    expected = losses(fit(folder, *ON_GPU, strategy(), f"--trainer.default_root_dir={folder / 'first'}", steps=6))
    assert len(expected) == 6
    offloaded = strategy(offload=True, checkpoints="sharded")
    given = [*ON_GPU, "--checkpoint.every_n_steps=2", "--checkpoint.keep=9"]
    assert losses(fit(folder, *given, offloaded, steps=6)) == pytest.approx(expected, rel=1e-5)
    for step, where in ((2, offloaded), (4, strategy())):
        path = next((folder / "runs").rglob(f"step-{step:08d}.ckpt"))
        assert path.is_dir()
        assert losses(fit(folder, *given, where, f"--ckpt_path={path}", steps=6)) == pytest.approx(expected, rel=1e-5)
