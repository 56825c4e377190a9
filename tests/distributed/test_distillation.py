"""Training from a teacher on shards, against the same on one device."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from leanbert.distributed.parallelize import parallelize, unreduced
from leanbert.memory.step import backpropagate_all_but_last
from leanbert.tasks.base import Task
from leanbert.tasks.distillation import Distillation
from leanbert.tasks.teachers import DistillationConfig
from tests.cli.program import run
from tests.distributed.ranks import on_ranks
from tests.distributed.test_strategy import ADAMW, SHARDED, TASKS, alike, fit, folder  # noqa: F401
from tests.distributed.test_strategy import ALL as ALL_TECHNIQUES
from tests.tasks.test_distillation import ALL, Plain, mlm_pair, seq2seq_pair
from tests.training import read_scalars

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("launcher_socket")]

PAIRS = {"mlm": mlm_pair, "seq2seq": seq2seq_pair}
WIDE = ["--model.encoder.num_layers=3", "--model.encoder.hidden_size=64", "--model.encoder.num_heads=4"]
CASES = [(name, micro_batch, chunk) for name in PAIRS for micro_batch, chunk in ((None, None), (1, 4))]


class OnRanks(Plain):
    """A student's task on several ranks, or on one."""

    loss_sum = Task.loss_sum

    def sum_over_ranks(self, value):
        value = value.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(value)
        return value


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_shards(model):
    return all(isinstance(each, DTensor) for each in model.parameters())


def passes(case, mesh=None):
    """Run the passes of a step; return its loss, and whole gradients by name."""
    name, micro_batch, chunk = case
    student, teacher, batch = PAIRS[name]()
    rank, world_size = (0, 1) if mesh is None else (mesh.get_rank(), mesh.size())
    task = OnRanks(parallelize(lambda: student, lambda _: None, mesh))
    task.build_teacher = lambda _: teacher
    task.model.head_chunk = chunk
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)  # of projections
    distillation = Distillation.build(
        DistillationConfig(teacher="t", **ALL), "t", task, mesh, dtype=None, fill=mesh is not None
    )
    torch.set_default_dtype(torch.float32)
    trained = torch.nn.ModuleList((task.model, distillation.projections))
    last, total = backpropagate_all_but_last(
        distillation, batch.split(len(batch) // world_size)[rank], micro_batch=micro_batch, world_size=world_size,
        sum_over_ranks=task.sum_over_ranks, no_sync=partial(unreduced, trained),
    )  # fmt: skip
    if mesh is not None:
        assert in_shards(distillation.teacher) == (chunk is None)  # scores will be made again
    last.backward()
    if mesh is not None:
        assert in_shards(distillation.teacher)
    gradients = {name: whole(each.grad).numpy() for name, each in trained.named_parameters() if each.grad is not None}
    return task.sum_over_ranks(total).item(), gradients


def passes_in_groups(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return [passes(case, mesh) for case in CASES]


def test_gradients_are_those_of_one_device():
    alone = [passes(case) for case in CASES]
    for found in on_ranks(passes_in_groups, 4):
        for (loss, gradients), (expected, wanted) in zip(found, alone, strict=True):
            assert loss == pytest.approx(expected, rel=1e-6)  # divergence is in float32
            assert gradients.keys() == wanted.keys()
            assert "1.0.weight" in gradients  # of a projection
            for name, gradient in wanted.items():
                there = torch.from_numpy(gradients[name])
                torch.testing.assert_close(there, torch.from_numpy(gradient), rtol=1e-6, atol=1e-9)


# ---- through the program


@pytest.fixture(scope="module")
def distil(folder):  # noqa: F811
    """Return arguments of a student that is narrower than its teacher."""
    path = fit(folder, "teacher", "mlm", *ADAMW, *WIDE, steps=3)
    learnt = {"teacher": str(path / "checkpoints" / "step-00000003.ckpt"), "hidden": 1.0, "relations": 1.0}
    return [
        *ALL_TECHNIQUES, f"--data.tokenizer={learnt['teacher']}", "--checkpoint.every_n_steps=10",
        *(f"--model.distillation.{name}={value}" for name, value in learnt.items()),
    ]  # fmt: skip


def test_two_processes_learn_as_one_and_one_goes_on_from_two(folder, distil):  # noqa: F811
    alone = fit(folder, "learns", "mlm", *distil)
    expected = read_scalars(alone)
    path = fit(folder, "learns-in-shards", "mlm", *distil, SHARDED, strategy="fsdp")
    found = read_scalars(path)
    alike(found, expected, rel=1e-5)
    measured = json.loads((path / "summary.json").read_text())["peak_bytes"]
    for root, run_folder, more in (("learns-in-shards", path, {}), ("learns", alone, {"strategy": "fsdp"})):
        middle = run_folder / "checkpoints" / "step-00000010.ckpt"
        fit(folder, root, "mlm", *distil, f"--ckpt_path={middle}", **more)
        alike(read_scalars(run_folder), expected, rel=1e-5)
    run(folder, "plan", *TASKS["mlm"], *distil, "--devices=2", "--prepare=true", "--json=learns.json")
    planned = json.loads((folder / "learns.json").read_text())["devices"]["fsdp2"]
    assert planned["predicted_peak_bytes"] == pytest.approx(measured, rel=0.02)
    [sent] = found["communication/bytes_per_step"].values()
    assert 0 < sent - planned["sent_bytes_per_step"] < 100  # the loss and the number of targets
