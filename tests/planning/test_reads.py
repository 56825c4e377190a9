"""No step on CUDA makes the host wait for a value: dry runs, which take the steps of `fit`, would have to make it up.

But for torch's Adafactor, which reads the norm of each weight.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.planning import dry_run
from leanbert.planning.fake import Fake
from leanbert.planning.predict import predict
from tests.planning.test_predict import settings
from tests.training import TINY


@pytest.fixture
def reads(monkeypatch):
    """Values that steps ask tensors for."""
    found, in_step = [], []
    dispatch, take_step = Fake.__torch_dispatch__, dry_run.take_step

    def watched(self, func, types, args=(), kwargs=None):
        if in_step and func is torch.ops.aten._local_scalar_dense.default:
            found.append(func)
        return dispatch(self, func, types, args, kwargs)

    def step(*arguments):
        in_step.append(True)
        take_step(*arguments)
        in_step.clear()

    monkeypatch.setattr(Fake, "__torch_dispatch__", watched)
    monkeypatch.setattr(dry_run, "take_step", step)
    return found


@pytest.mark.parametrize(
    "names",
    [
        (), ("accumulation",), ("checkpointing", "chunked_head"), ("bf16_true", "adamw_8bit"), ("adama",),
        ("layer_major", "optimizer_in_backward", "adamw_4bit"), ("pruning",), ("bf16_mixed",),
    ],
    ids="+".join,
)  # fmt: skip
def test_no_technique_reads(reads, names):
    run = settings(*names, micro_batch=4 if names == ("accumulation",) else None, encoder={"num_layers": 2})
    predict(replace(run, device_type="cuda"))
    assert reads == []


def test_muon_does_not_read(reads):
    predict(replace(settings(optimizer="muon", encoder={"num_layers": 2}), device_type="cuda"))
    assert reads == []


def test_a_step_on_a_cpu_looks_whether_it_is_finite(reads):
    predict(settings(encoder={"num_layers": 2}))
    assert len(reads) == 1


class Planned(CLI):
    def plan(self, options):
        predict(self.run_settings())


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("srl", []),
        ("translation", ["--model.encoder.preset=bert", "--model.copy=true"]),
        ("classification", ["--model.class_weights={one: 2.0}", "--data.train_files=labelled.jsonl"]),
    ],
)
def test_no_task_reads(reads, tmp_path, monkeypatch, task, more):
    quiet_libraries()
    lines = [json.dumps({"text": f"text number {number}", "label": ("one", "two")[number % 2]}) for number in range(50)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    Planned(["plan", f"--config=configs/{task}.yaml", *TINY, "--trainer.precision=bf16-mixed", "--target=cuda", *more])
    assert reads == []
