"""`compress` that trains: the whole program, whose runs of `fit` are processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import leanbert
from leanbert import signals
from leanbert.cli.training import student_settings, train_student
from leanbert.compression.pruning import prunable
from leanbert.compression.steps import parse_steps
from leanbert.errors import UserError
from tests.training import TINY, fit

GIVEN = {
    "seed_everything": 3,
    "trainer": {
        "max_steps": 900,
        "max_epochs": 2,
        "callbacks": [
            {"class_path": "MemoryMonitor"},
            {"class_path": "leanbert.x.MagnitudePruning"},
            {"class_path": "MovementPruning"},
        ],
    },
    "model": {"init_args": {"init_from": None, "distillation": {"teacher": None, "hidden": 1.0}}},
    "data": {},
    "checkpoint": {"monitor": "val/loss"},
    "output": "x",
}


def test_a_student_learns_from_what_is_compressed_unless_a_teacher_is_named(tmp_path):
    cuts = parse_steps(["blocks=0.5"])
    settings = student_settings(GIVEN, tmp_path / "m.ckpt", cuts, 70)
    assert "output" not in settings
    assert settings["trainer"]["max_steps"] == 70
    assert settings["trainer"]["max_epochs"] is None
    assert [callback["class_path"] for callback in settings["trainer"]["callbacks"]] == [
        "MemoryMonitor", "StructuredPruning",
    ]  # fmt: skip
    own = settings["model"]["init_args"]
    assert own == {"init_from": str(tmp_path / "m.ckpt"), "distillation": {"teacher": "init_from", "hidden": 1.0}}
    named = {**GIVEN, "model": {"init_args": {"init_from": None, "distillation": {"teacher": "t.ckpt"}}}}
    other = student_settings(named, tmp_path / "m.ckpt", cuts, 70)
    assert other["model"]["init_args"]["distillation"]["teacher"] == "t.ckpt"


@pytest.mark.parametrize(("status", "code"), [("refused", 2), ("stopped", 0), ("failed", 1)])
def test_a_training_that_has_not_finished_is_not_measured(tmp_path, monkeypatch, status, code):
    (tmp_path / "m.ckpt").write_bytes(b"weights")
    monkeypatch.setattr(signals, "run", lambda command: code)
    settings = student_settings(GIVEN, tmp_path / "m.ckpt", parse_steps(["blocks=0.5"]), 70)
    expected = SystemExit if status == "refused" else UserError
    with pytest.raises(expected, match="2" if status == "refused" else "has ended early, see above. The same command"):
        train_student(settings, parse_steps(["blocks=0.5"]), "mlm", tmp_path / "runs")


def test_a_teacher_that_was_trained_again_has_a_run_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "run", lambda command: 1)
    for content in (b"weights", b"weights", b"others"):
        (tmp_path / "m.ckpt").write_bytes(content)
        with pytest.raises(UserError):
            train_student(student_settings(GIVEN, tmp_path / "m.ckpt", [], 70), [], "mlm", tmp_path / "runs")
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("zeros", ["pruning", "movement_pruning"])
def test_compress_trains_what_is_cut_once_and_goes_on_with_a_run_that_was_stopped(tmp_path, zeros):
    (tmp_path / "train.txt").write_text("".join(f"the {i} tests of words {i * i}\n\n" for i in range(400)))
    whole = fit(tmp_path, steps=6)
    teacher = whole.runs.find("last").path
    command = [
        sys.executable, "train.py", "compress", "--config=configs/mlm.yaml", *TINY, f"--ckpt_path={teacher}",
        f"--data.train_files={tmp_path / 'train.txt'}", f"--data.cache_dir={tmp_path / 'cache'}",
        "--trainer.accelerator=cpu", f"--output={tmp_path / 'out'}", "--seconds=0.1",
        f'--steps=["blocks=0.5", "{zeros}=0.8", "train=6"]',
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        (root,) = (tmp_path / "out/training").iterdir()
        (run,) = (root / "mlm").iterdir()  # the second time it is finished
    assert yaml.safe_load((root / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/report.json").read_text())["variants"]}
    name = f"blocks-0.5+{zeros}-0.8+train-6"
    assert (f"blocks-0.5+{zeros}-0.8" in rows) is (zeros == "pruning")
    student = leanbert.load(tmp_path / "out" / name).model
    trained = leanbert.load(run / "checkpoints/last.ckpt" if (run / "checkpoints/last.ckpt").is_file() else
                            max((run / "checkpoints").glob("step-*.ckpt"))).model  # fmt: skip
    assert student.config.num_layers == 1
    for one, other in zip(student.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rows[name]["runtime"] == "PyTorch float32"
    matrices = list(prunable(student, include_embeddings=zeros == "pruning").values())
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    assert zeros == pytest.approx(0.8 * sum(matrix.numel() for matrix in matrices), rel=0.01)
    assert rows[name]["nonzero"] == rows[name]["parameters"] - sum(int((p == 0).sum()) for p in student.parameters())
    assert rows[name]["size_bytes"] < 0.55 * rows["blocks-0.5"]["size_bytes"]
