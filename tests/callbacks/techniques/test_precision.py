from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from leanbert.callbacks.techniques.precision import Precision
from leanbert.errors import UserError
from tests.corpus import write_corpus
from tests.training import fit, scalars


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    write_corpus(folder / "train.txt")
    return folder


def overlay(folder, precision, start_step):
    path = folder / "precision.yaml"
    path.write_text(
        "trainer:\n  callbacks+:\n    - class_path: leanbert.callbacks.techniques.precision.Precision\n"
        f"      init_args: {{precision: {precision}, start_step: {start_step}}}\n"
    )
    return f"--config={path}"


def test_settings():
    with pytest.raises(UserError, match="dtype of weights"):
        Precision("bf16-true", start_step=3)
    with pytest.raises(UserError, match=r"^Precision\.start_step: -1 is out of range"):
        Precision("bf16-mixed", start_step=-1)


def test_a_start_after_the_end_is_refused(folder):
    with pytest.raises(UserError, match="after the last step"):
        fit(folder, overlay(folder, "bf16-mixed", 4), steps=4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_starts_at_its_step_also_when_resumed(folder, precision):
    plain = scalars(fit(folder, steps=6))["train/loss"]
    cli = fit(folder, overlay(folder, precision, 3), "--checkpoint.every_n_steps=2", steps=6)
    logged = scalars(cli)
    assert logged["precision/bits"] == {0: 32.0, 3: 16.0}
    assert [logged["train/loss"][step] == plain[step] for step in range(1, 7)] == [True] * 3 + [False] * 3
    for step in (4, 6):
        kept = folder / f"{precision}-{step}.ckpt"
        saved = Path(cli.trainer.log_dir) / "checkpoints" / f"step-0000000{step}.ckpt"
        kept.write_bytes(saved.read_bytes())
    more = fit(folder, overlay(folder, precision, 3), f"--ckpt_path={folder / f'{precision}-4.ckpt'}", steps=6)
    assert scalars(more)["train/loss"] == {step: logged["train/loss"][step] for step in (5, 6)}


def test_true_bfloat16_has_no_float32_weights_or_metrics_in_bfloat16(folder):
    cli = fit(folder, overlay(folder, "bf16-true", 0), steps=2)
    assert {parameter.dtype for parameter in cli.model.model.parameters()} == {torch.bfloat16}
    assert cli.trainer.optimizers[0].param_groups[0]["params"][0].dtype == torch.bfloat16
    logged, plain = scalars(cli), scalars(fit(folder, steps=2))
    assert logged["val/unigram_loss"] == plain["val/unigram_loss"]
    assert float(torch.tensor(logged["val/loss"][2]).bfloat16()) != logged["val/loss"][2]


def test_updates_below_the_grid_of_bfloat16_are_not_lost(folder):
    """With a rate of 1e-4 most updates are below half a step of the grid; rounding to nearest would lose them."""
    slow = "--model.optimizer.lr=1e-4"
    begin = fit(folder, overlay(folder, "bf16-true", 0), slow, steps=1).model.model.state_dict()
    end = fit(folder, overlay(folder, "bf16-true", 0), slow, steps=12).model.model.state_dict()
    name = "encoder.blocks.1.attention.qkv.weight"
    moved = (begin[name] != end[name]).float().mean()
    assert moved > 0.5


def test_loss_scaling_goes_on_with_its_scale(folder):
    """A start of 65,536 would overflow again where training has come down from it."""
    callback = Precision("16-mixed", start_step=3)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    scaler = callback._plugin(trainer).scaler
    scaler.scale(torch.ones(()))  # begins to scale
    scaler.update(128.0)
    assert callback.state_dict()["scaler"]["scale"] == 128.0
    resumed = Precision("16-mixed", start_step=3)
    resumed.load_state_dict(callback.state_dict())
    assert resumed._plugin(trainer).scaler.get_scale() == 128.0
