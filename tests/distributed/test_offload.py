"""Shards in host memory: where everything is on a pretended accelerator, and training by the same code on a CPU."""

from __future__ import annotations

import json
import traceback
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from leanbert.compression.pruning import add_movement, apply_masks, block_scores, make_masks, prunable
from leanbert.distributed.parallelize import gathered, parallelize
from leanbert.distributed.state import blank_shards, decoded_state, gather, gather_state, shard_state
from leanbert.distributed.strategy import FullySharded
from leanbert.errors import UserError
from leanbert.memory.finite import StepCheck
from leanbert.memory.step import backpropagate_all_but_last
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.tasks.techniques import Surroundings, Techniques, refuse
from tests.cli.program import ROOT, refused, run
from tests.distributed import accelerator, offloaded
from tests.distributed.test_strategy import ADAMW, ALL, TASKS, alike, fit, folder  # noqa: F401
from tests.tiny import PlainTask, tiny_model, unequal_batch
from tests.training import TINY, read_scalars

OFFLOAD = "--config=configs/strategy/fsdp_offload.yaml"


def places(tensors):
    return {tensor.device.type for tensor in tensors}


def tensors_of(optimizer):
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]


class Copies:
    """Counts what FSDP2 copies between host and device, by direction, and whether the host goes on meanwhile."""

    def __init__(self):
        self.to_device = self.to_host = 0

    def __enter__(self):
        before = torch.Tensor.to

        def to(tensor, *args, **kwargs):
            if "non_blocking" in kwargs and not isinstance(tensor, DTensor):
                goes = before(tensor, *args, **kwargs)
                self.to_device += kwargs["non_blocking"] and goes.device.type == accelerator.NAME
                self.to_host += kwargs["non_blocking"] and goes.device.type == "cpu"
                return goes
            return before(tensor, *args, **kwargs)

        self._patch = patch.object(torch.Tensor, "to", to)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def step(model, batch, devices, micro_batch=None):
    last, total = backpropagate_all_but_last(
        PlainTask(model), batch, micro_batch=micro_batch, world_size=devices, sum_over_ranks=lambda value: value
    )
    last.backward()
    return total


def check_moves(strategy, model):
    """What is not sharded, and the module's own device, are the accelerator's; shards stay."""
    module = LightningModule()
    module.model = model
    module.register_buffer("counts", torch.zeros(2))
    strategy.connect(module)
    strategy.model_to_device()
    assert module.device.type == module.counts.device.type == accelerator.NAME
    assert places(model.parameters()) == {"cpu"}


def check_placed(devices, replicas, optimizer_name):
    """Run steps, save and load, and look where everything is; what mixes devices is an error of its own."""
    with accelerator.accelerators(devices, replicas) as mesh:
        model = parallelize(
            lambda: tiny_model(torch.float32, position="sinusoidal"), lambda _: None, mesh, offload=True
        )
        parameters = list(model.parameters())
        assert places(parameters) == {"cpu"}
        assert all(each.to_local().is_pinned() for each in parameters)
        assert places(model.buffers()) == {accelerator.NAME} == {model.device.type}
        optimizer = build_optimizer(model, OptimizerConfig(name=optimizer_name))
        batch = unequal_batch().to(accelerator.NAME)
        of_blocks = len(list(model.encoder.blocks.parameters()))
        for micro_batch, moved in ((None, len(parameters)), (4, len(parameters))):
            with Copies() as copies:
                loss = step(model, batch, devices, micro_batch)
            assert copies.to_device == (len(parameters) + of_blocks) * (2 if micro_batch else 1)
            assert copies.to_host == moved  # what adds to a gradient that is there waits
            assert loss.device.type == accelerator.NAME
            assert places(each.grad for each in parameters) == {"cpu"}
            assert places(each.grad.to_local() for each in parameters) == {"cpu"}
            check = StepCheck()
            check.loss = loss
            check.guard(parameters, lambda value: value)
            assert check.values.device.type == "cpu"
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            weights = prunable(model, False)
            scores = {name: torch.zeros_like(weight, requires_grad=False) for name, weight in weights.items()}
            add_movement(scores, weights)
            optimizer.step()
            optimizer.zero_grad()
            assert places(tensors_of(optimizer)) == {"cpu"}
        masks = make_masks(weights, 0.5, "2:4")
        apply_masks(weights, masks)
        assert places([*scores.values(), *masks.values()]) == {"cpu"}
        assert places(block_scores(weight, 4) for weight in weights.values()) == {"cpu"}
        assert places(own for each in decoded_state(optimizer.state_dict(), optimizer)["state"].values()
                      for own in each.values() if isinstance(own, torch.Tensor)) == {"cpu"}  # fmt: skip
        whole = gather_state(optimizer.state_dict(), optimizer, keep=True)
        optimizer.load_state_dict(shard_state(whole, optimizer))
        assert places(tensors_of(optimizer)) == {"cpu"}
        stored = {name: gather(weight.detach(), keep=True) for name, weight in model.state_dict().items()}
        set_model_state_dict(model, stored, options=StateDictOptions(full_state_dict=True))
        shards = {name: blank_shards(weight, mesh, offload=True) for name, weight in stored.items()}
        assert places(shards.values()) == {"cpu"}
        set_model_state_dict(model, shards)
        assert places(model.parameters()) == {"cpu"}
        step(model, batch, devices)
        with torch.no_grad(), gathered(model):
            assert places(model.parameters()) == {accelerator.NAME} == {model.device.type}
            model(batch.inputs, batch.target_index)
        with patch.object(FullySharded, "root_device", torch.device(accelerator.NAME, 0)):
            check_moves(FullySharded(offload=True), model)


def check_all_placed():
    accelerator.register()
    for devices, replicas, optimizer in ((1, 1, "adamw"), (2, 1, "muon"), (2, 1, "adafactor"), (4, 2, "adamw8bit")):
        try:
            check_placed(devices, replicas, optimizer)
        except Exception:  # some of torch's cannot be sent to the test's process
            raise AssertionError(traceback.format_exc()) from None


@pytest.mark.slow
def test_all_that_is_sharded_lies_on_the_host():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(check_all_placed).result()


def test_groups_exchange_tensors_of_host_and_device(monkeypatch):
    for device, backends in (("cuda", ["nccl", "cpu:gloo,cuda:nccl"]), ("cpu", ["gloo", "gloo"])):
        monkeypatch.setattr(FullySharded, "root_device", torch.device(device))
        assert [FullySharded(offload=each)._get_process_group_backend() for each in (False, True)] == backends
    given = FullySharded(offload=True)
    given._process_group_backend = "cpu:gloo,cuda:nccl"  # it is asked for again
    assert given._get_process_group_backend() == "cpu:gloo,cuda:nccl"


def test_updates_in_the_backward_pass_are_refused():
    around = Surroundings("adamw", "32-true", "cuda", shards=True, offloads=True)
    refuse(Techniques(), around)
    for kind, micro_batch in (("update", None), ("accumulate", 2)):
        with pytest.raises(UserError, match=r"OptimizerInBackward: with trainer\.strategy\.offload"):
            refuse(Techniques(in_backward=kind, micro_batch=micro_batch), around)


@pytest.mark.slow
@pytest.mark.usefixtures("launcher_socket")
def test_a_cpu_has_no_other_memory(folder):  # noqa: F811
    given = [*TINY, "--data.train_files=train.txt", OFFLOAD, "--trainer.accelerator=cpu"]
    says = ["trainer.strategy.offload: a CPU's memory is that of the host already"]
    refused(folder, "fit", *given, "--trainer.devices=1", "--trainer.max_steps=1", says=says)
    refused(folder, "plan", *given, "--target=cpu", "--prepare=true", says=says)


def offloaded_fit(folder, root, *arguments, devices=2, steps=20):  # noqa: F811
    """Train with shards offloaded; return the run's folder."""
    run(
        folder, "fit", *TASKS["mlm"], OFFLOAD, "--trainer.accelerator=cpu", f"--trainer.devices={devices}", *arguments,
        f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={root}", "--trainer.val_check_interval=10",
        program=offloaded.__file__,
    )  # fmt: skip
    return folder / root / "mlm" / "version_0"


@pytest.mark.slow
@pytest.mark.usefixtures("launcher_socket")
def test_losses_and_checkpoints_are_those_without(folder, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    exact = [*(each for each in ALL if "micro" not in each), "--checkpoint.every_n_steps=10"]
    there = fit(folder, "shards", "mlm", *exact, strategy="fsdp")
    kept = json.dumps({"class_path": "FullySharded", "init_args": {"offload": True, "checkpoints": "sharded"}})
    here = offloaded_fit(folder, "offloaded", *exact, f"--trainer.strategy={kept}")
    expected = read_scalars(there)
    assert len(expected["train/loss"]) == 20
    for tag in ("train/loss", "val/loss"):
        assert read_scalars(here)[tag] == expected[tag]
    middle = here / "checkpoints" / "step-00000010.ckpt"
    assert middle.is_dir()
    fit(folder, "offloaded", "mlm", *exact, f"--ckpt_path={middle}")  # on one device
    alike(read_scalars(here), expected)
    fewer = [*exact, "--config=micro.yaml", f"--ckpt_path={there / 'checkpoints' / 'step-00000010.ckpt'}"]
    offloaded_fit(folder, "shards", *fewer, devices=1)
    alike(read_scalars(there), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("launcher_socket")
def test_techniques_work_as_on_shards(folder, monkeypatch):  # noqa: F811
    """A teacher, momentum and importance in host memory, and rounding."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    teacher = fit(folder, "teacher", "mlm", *ADAMW, steps=1) / "checkpoints" / "step-00000001.ckpt"
    pruning = json.dumps({"class_path": "MovementPruning", "init_args": {"final_sparsity": 0.7, "block_size": 4}})
    given = [
        "--model.optimizer.name=muon", "--model.optimizer.lr=1e-3", f"--model.distillation.teacher={teacher}",
        "--config=configs/memory/quantization_aware.yaml", f"--trainer.callbacks+={pruning}",
    ]  # fmt: skip
    there = read_scalars(fit(folder, "techniques", "mlm", *given, strategy="fsdp"))
    here = read_scalars(offloaded_fit(folder, "techniques-offloaded", *given))
    for tag in ("train/loss", "val/loss", "pruning/sparsity"):
        assert here[tag] == there[tag]
