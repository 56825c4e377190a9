import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from leanbert.errors import TrainingFailed, UserError
from leanbert.tasks.mlm import MaskedLM
from leanbert.trainer import Trainer
from tests.corpus import write_corpus
from tests.training import TINY, fit

QUIET = ("--trainer.limit_val_batches=1", "--trainer.callbacks=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_steps")
    write_corpus(folder / "train.txt", documents=100)
    return folder


@pytest.fixture
def poisoned(monkeypatch):
    """The losses of the steps in the list that is returned are NaN."""
    steps, loss_sum = [], MaskedLM.loss_sum

    def poison(task, batch):
        loss = loss_sum(task, batch)
        return loss * math.nan if task.training and task.global_step + 1 in steps else loss

    monkeypatch.setattr(MaskedLM, "loss_sum", poison)
    return steps


def weights(cli):
    return {name: tensor.clone() for name, tensor in cli.model.state_dict().items()}


def test_three_in_a_row_stop_the_run(folder, poisoned, capfd):
    poisoned += [2, 3, 4]
    with pytest.raises(TrainingFailed) as stopped:
        fit(folder, *QUIET, f"--trainer.default_root_dir={folder / 'stopped'}", steps=9)
    run = folder / "stopped" / "mlm" / "version_0"
    assert str(stopped.value) == (
        "step 4: the loss is nan, at learning rate 0.001 in 32-true; such steps in a row: 3 (trainer.max_bad_steps). "
        f"Lower the learning rate, set trainer.gradient_clip_val, or look at the batch in {run / 'bad_batch.pt'}."
    )
    said = capfd.readouterr().err
    for step in (2, 3, 4):
        assert f"warning: step {step}: the loss is nan, its update is left out; the batch is in {run}" in said
    summary = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["status"], summary["steps"]) == ("failed", 4)
    assert summary["metrics"]["train/loss"] is None
    saved = torch.load(run / "bad_batch.pt", weights_only=True)
    assert (saved["step"], math.isnan(saved["loss"])) == (4, True)
    assert {name: tuple(tensor.shape) for name, tensor in saved["batch"].items()} == {
        "input_ids": (8, 32), "position_ids": (8, 32), "document_ids": (8, 32), "target_index": (8, 6),
        "targets": (8, 6),
    }  # fmt: skip


def test_fewer_in_a_row_are_left_out(folder, poisoned, capfd):
    """Of seven steps two and two are bad, and three update."""
    poisoned += [2, 3, 5, 6]
    cli = fit(folder, *QUIET, steps=7)
    assert cli.trainer.global_step == 7
    assert capfd.readouterr().err.count("its update is left out") == 4
    assert all(tensor.isfinite().all() for tensor in weights(cli).values())
    steps = {int(state["step"]) for state in cli.trainer.optimizers[0].state.values()}
    assert steps == {3}


def test_the_number_is_a_setting_and_is_kept_over_a_kill(folder, poisoned):
    poisoned += [1, 2, 3, 4]
    with pytest.raises(TrainingFailed, match=r"^step 1: the loss is nan, .* such steps in a row: 1 "):
        fit(folder, *QUIET, "--trainer.max_bad_steps=1", steps=4)
    first = fit(folder, *QUIET, "--trainer.max_bad_steps=3", steps=2)
    kept = folder / "kept.ckpt"
    kept.write_bytes((Path(first.trainer.log_dir) / "checkpoints" / "step-00000002.ckpt").read_bytes())
    with pytest.raises(TrainingFailed, match=r"^step 3: "):
        fit(folder, *QUIET, f"--ckpt_path={kept}", steps=4)
    with pytest.raises(UserError, match=r"^trainer\.max_bad_steps: 0 is out of range\. Give a whole number, 1 or more"):
        Trainer(max_bad_steps=0)


@pytest.fixture
def steep(monkeypatch):
    """The loss is finite and its gradient is not: the square root has no finite slope at 0."""
    loss_sum = MaskedLM.loss_sum

    def steep(task, batch):
        loss = loss_sum(task, batch)
        return loss + (task.model.head.bias.sum() * 0.0).sqrt() if task.training else loss

    monkeypatch.setattr(MaskedLM, "loss_sum", steep)


def test_a_gradient_may_be_bad_where_the_loss_is_not(folder, steep):
    with pytest.raises(TrainingFailed, match=r"^step 3: a gradient's norm is nan, at .* such steps in a row: 3 "):
        fit(folder, *QUIET, steps=4)


def test_loss_scaling_may_overflow_while_it_looks_for_a_scale(folder, steep, capfd):
    """The scale halves from 65,536 to 1 in 16 steps: only then are gradients bad for themselves."""
    with pytest.raises(TrainingFailed, match=r"^step 19: .* in 16-mixed; such steps in a row: 3 .* to 32-true"):
        fit(folder, "--trainer.limit_val_batches=1", overlays=("fp16_mixed",), steps=30)
    assert capfd.readouterr().err.count("warning: step") == 3


@pytest.mark.parametrize("overlay", ["optimizer_in_backward", "adama", "layer_major"])
def test_techniques_leave_a_bad_step_out_too(folder, poisoned, overlay):
    poisoned += [2]
    settings = ("--data.batch_size=16", "--trainer.limit_val_batches=1")
    cli = fit(folder, *settings, overlays=(overlay,), steps=2)
    reference = fit(folder, *settings, overlays=(overlay,), steps=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(cli).values(), weights(reference).values(), strict=True))


def test_a_loss_of_validation_that_is_not_finite_is_said(folder, monkeypatch, capfd):
    monkeypatch.setattr("leanbert.tasks.metrics.cross_entropy_sum", lambda *_: torch.tensor(math.inf))
    fit(folder, *QUIET, steps=1)
    assert "warning: val/loss is inf after step 1, which is no best checkpoint" in capfd.readouterr().err


ONE_BAD_RANK = """
import math
import os
import subprocess
import sys
from leanbert.cli import main
from leanbert.tasks.mlm import MaskedLM

loss_sum = MaskedLM.loss_sum

def poison(task, batch):
    return loss_sum(task, batch) * (math.nan if task.training and task.global_rank == 1 else 1.0)

MaskedLM.loss_sum = poison
main()
"""


@pytest.mark.slow
def test_ranks_stop_together_when_one_computes_nonsense(folder, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(ONE_BAD_RANK)
    arguments = [
        sys.executable, str(script), "fit", "--config=configs/mlm.yaml", *TINY, *QUIET,
        f"--data.train_files={folder / 'train.txt'}", f"--data.cache_dir={folder / 'cache'}",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=5", "--trainer.devices=2",
        "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_bad_steps=2",
    ]  # fmt: skip
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1
    assert "error: step 2: the loss is nan, at learning rate" in done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "mlm" / "version_0"
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    own, other = (torch.load(run / f"bad_batch{rank}.pt", weights_only=True)["batch"] for rank in ("", "_rank1"))
    assert own["input_ids"].shape == other["input_ids"].shape == (4, 32)
    assert not torch.equal(own["input_ids"], other["input_ids"])
