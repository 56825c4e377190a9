import json
from types import SimpleNamespace

import pytest
import torch

import leanbert
from leanbert import checkpoints
from leanbert.callbacks.loop.averaging import KeptWeights
from leanbert.callbacks.loop.checkpoint import RunCheckpoint
from leanbert.errors import UserError
from leanbert.runs import TaskRuns
from tests.corpus import write_corpus
from tests.training import fit, scalars

OFTEN = ("--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", "--checkpoint.every_n_steps=3")


def weights(path):
    return checkpoints.load(path)["state_dict"]


def steps_kept(folder):
    return [int(path.stem.removeprefix("step-")) for path in sorted((folder / "weights").iterdir())]


def same_as_mean(folder, steps):
    """Each weight of the average is the mean, in float64, of the kept files, to 2 units of float32's last place."""
    parts = [weights(folder / "weights" / checkpoints.step_name(step)) for step in steps]
    for name, average in weights(folder / "average.ckpt").items():
        together = torch.stack([part[name].double() for part in parts])
        assert (average - together.mean(0)).abs().max() <= 2 * 2.0**-23 * together.abs().max(), name
        assert not torch.equal(together[0], together[-1]) or (together[0] == 0).all(), name


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "train.txt")
    return tmp_path


def run_folder(corpus):
    return corpus / "runs" / "mlm" / "version_0" / "checkpoints"


def test_the_last_are_averaged_and_validated(corpus, capsys):
    cli = fit(corpus, *OFTEN, "--checkpoint.average_last=3", steps=9)
    folder = run_folder(corpus)
    assert steps_kept(folder) == [6, 8, 9]  # 9 is validated because the run ends there
    same_as_mean(folder, [6, 8, 9])
    assert checkpoints.load(folder / "average.ckpt").keys().isdisjoint(checkpoints.TRAINING_STATE)
    own = weights(folder / "step-00000009.ckpt")
    assert all(torch.equal(tensor, own[name]) for name, tensor in cli.model.state_dict().items())
    logged = scalars(cli)
    assert logged["average/loss"].keys() == {9}
    assert logged["val/loss"].keys() == {0, 2, 4, 6, 8, 9}
    metrics = json.loads((folder.parent / "summary.json").read_text())["metrics"]
    assert metrics["val/loss"] == pytest.approx(logged["val/loss"][9])
    assert metrics["average/loss"] == pytest.approx(logged["average/loss"][9])
    assert metrics["average/loss"] != metrics["val/loss"]
    said = capsys.readouterr().err
    assert "steps 6, 8, 9" in said
    best = min(logged["val/loss"][step] for step in (2, 4, 6, 8, 9))
    assert f"val/loss {metrics['average/loss']:.4f}, of the best checkpoint {best:.4f}" in said


def keep_all(kept, folder, losses):
    """Let `kept` see a validation after each step of `losses`, without a run."""
    for step, loss in losses.items():
        trainer = SimpleNamespace(
            global_step=step,
            callback_metrics={} if loss is None else {"val/loss": torch.tensor(loss)},
            is_global_zero=True,
            save_checkpoint=lambda path, weights_only: checkpoints.save({"state_dict": {}}, path),
        )
        kept.keep(trainer, folder)


LOSSES = {0: 0.5, 1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: float("nan"), 6: 3.5, 7: 3.0, 8: 6.0, 9: None}


@pytest.mark.parametrize(
    ("count", "monitor", "sign", "expected"),
    [
        (2, "val/loss", 1.0, [2, 4]),  # of equal ones the earlier
        (4, "val/loss", 1.0, [2, 4, 6, 7]),
        (2, "val/loss", -1.0, [1, 8]),
        (3, None, 1.0, [7, 8, 9]),
    ],
)
def test_the_best_are_those_of_metric_and_mode(tmp_path, count, monitor, sign, expected):
    kept = KeptWeights(count, monitor, sign)
    keep_all(kept, tmp_path, LOSSES)
    assert [step for step, _ in kept.kept] == steps_kept(tmp_path) == expected


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_resumed_run_averages_what_an_undisturbed_one_does(corpus, mode):
    average = ("--checkpoint.average_best=3", f"--checkpoint.mode={mode}", "--checkpoint.keep=9")
    losses = scalars(fit(corpus, *OFTEN, *average, steps=12))["val/loss"]
    folder, sign = run_folder(corpus), 1 if mode == "min" else -1
    expected, kept = weights(folder / "average.ckpt"), steps_kept(folder)
    assert kept == sorted(sorted(list(losses)[1:], key=lambda step: sign * losses[step])[:3])
    same_as_mean(folder, kept)
    fit(corpus, *OFTEN, *average, f"--ckpt_path={folder / 'step-00000006.ckpt'}", steps=12)
    assert steps_kept(folder) == kept
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder / "average.ckpt").items())


def test_weights_of_an_abandoned_course_are_not_averaged(corpus):
    average = ("--checkpoint.average_last=4", "--checkpoint.keep=9")
    fit(corpus, *OFTEN, *average, steps=12)
    folder = run_folder(corpus)
    first = weights(folder / "weights" / checkpoints.step_name(8))
    back = f"--ckpt_path={folder / 'step-00000006.ckpt'}"
    fit(corpus, *OFTEN, *average, back, "--model.optimizer.lr=0.1", steps=10)
    assert steps_kept(folder) == [6, 8, 10]  # 4 had made way for 12
    assert not torch.equal(
        first["model.encoder.embeddings.token.weight"],
        weights(folder / "weights" / checkpoints.step_name(8))["model.encoder.embeddings.token.weight"],
    )
    same_as_mean(folder, [6, 8, 10])
    assert checkpoints.load(folder / "abandoned-average.ckpt")["global_step"] == 12


def test_an_average_is_used_like_other_checkpoints(corpus, capsys):
    fit(corpus, *OFTEN, "--checkpoint.average_last=2", steps=4)
    path = TaskRuns(str(corpus / "runs"), "mlm").find("average").path
    stored = weights(path)
    model = leanbert.load(path).model
    assert all(torch.equal(tensor, stored[f"model.{name}"]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match=r"--ckpt_path: .*average\.ckpt holds weights only.*--model\.init_from"):
        fit(corpus, "--ckpt_path=average", steps=8)
    started = fit(corpus, f"--model.init_from={path}", "--trainer.limit_val_batches=2", steps=1)
    capsys.readouterr()
    average = json.loads((path.parents[1] / "summary.json").read_text())["metrics"]["average/loss"]
    assert scalars(started)["val/loss"][0] == pytest.approx(average, abs=1e-5)


def test_too_few_validations(corpus, capsys):
    fit(corpus, "--trainer.limit_val_batches=1", "--checkpoint.average_last=3", steps=2)
    assert "no average of 1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--ckpt_path average: no .*average\.ckpt.*checkpoint\.average_last"):
        TaskRuns(str(corpus / "runs"), "mlm").find("average")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint.average_last=1"], "checkpoint.average_last: 1 is out of range. Give a whole number, 2 or more"),
        (["--checkpoint.average_best=0"], "checkpoint.average_best: 0 is out of range. Give a whole number, 2 or more"),
        (["--checkpoint.average_last=2", "--trainer.limit_val_batches=0"], "limit_val_batches is 0"),
        (["--checkpoint.monitor=val/none"], r"^checkpoint\.monitor: no val/none is logged\. Choose from .*val/loss"),
    ],
)
def test_settings_that_cannot_work(corpus, arguments, message):
    with pytest.raises(UserError, match=message):
        fit(corpus, "--trainer.limit_val_batches=1", *arguments, steps=2)


def test_last_and_best_at_once():
    with pytest.raises(UserError, match="average_last: and average_best are both given"):
        RunCheckpoint(average_last=2, average_best=2)


@pytest.mark.parametrize(
    "callback", ["MagnitudePruning", "MovementPruning", "StructuredPruning, init_args: {at_step: 2}"]
)
def test_weights_that_have_no_mean(corpus, callback):
    overlay = corpus / "overlay.yaml"
    overlay.write_text(f"trainer: {{callbacks+: [{{class_path: leanbert.callbacks.techniques.pruning.{callback}}}]}}\n")
    with pytest.raises(UserError, match=rf"checkpoint\.average_last: is 2, but {callback.split(',')[0]}"):
        fit(corpus, f"--config={overlay}", "--checkpoint.average_last=2", steps=8)
