import json
import os
from pathlib import Path

import pytest
import torch

from leanbert import checkpoints
from leanbert.callbacks.loop.checkpoint import RunCheckpoint, clear_for
from leanbert.errors import UserError
from leanbert.runs import Run, TaskRuns
from tests.corpus import write_corpus
from tests.training import fit, read_scalars

OFTEN = ("--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--checkpoint.every_n_steps=3")


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "train.txt")
    return tmp_path


def run_folder(corpus, version=0):
    return corpus / "runs" / "mlm" / f"version_{version}"


def summary(folder):
    """What a summary says of training, without what is of the process."""
    kept = json.loads((folder / "summary.json").read_text())
    return {key: kept[key] for key in ("status", "metrics", "steps", "tokens", "checkpoint")}


def same_weights(first, second):
    one, two = checkpoints.load(first)["state_dict"], checkpoints.load(second)["state_dict"]
    return all(torch.equal(tensor, two[name]) for name, tensor in one.items())


class Killed(BaseException):
    """As by kill -9: nothing that would run at an ordinary end runs."""


def killed(monkeypatch, corpus, *arguments, steps, at, call=1):
    """Train until `at`, a method of this package by its name that returns nothing, is called so many times."""
    calls = []

    def die(*_, **__):
        calls.append(1)
        if len(calls) == call:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(at, die)
        patch.setattr("leanbert.callbacks.reporting.report.RunSummary.on_exception", lambda *_: None)
        with pytest.raises(Killed):
            fit(corpus, *arguments, steps=steps)
    assert len(calls) == call


ENDS = {
    "before the last validation": "leanbert.callbacks.loop.validation.ValidateAtEnds.on_train_end",
    "before the average": "leanbert.callbacks.loop.averaging.KeptWeights.write_mean",
    "before the average is validated": "leanbert.callbacks.loop.checkpoint.RunCheckpoint._validate_mean",
    "before the summary": "leanbert.callbacks.reporting.report.RunSummary.on_fit_end",
}


AVERAGED = (*OFTEN, "--checkpoint.average_last=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    write_corpus(folder / "train.txt")
    fit(folder, *AVERAGED, steps=5)
    return run_folder(folder)


@pytest.mark.parametrize("end", ENDS)
def test_what_a_kill_has_prevented_at_the_end_is_made_up(corpus, undisturbed, monkeypatch, end):
    """Values, average and summary are those of an undisturbed run, also where no step is left to train."""
    killed(monkeypatch, corpus, *AVERAGED, steps=5, at=ENDS[end])
    folder = run_folder(corpus)
    assert not (folder / "summary.json").exists()
    fit(corpus, *AVERAGED, "--ckpt_path=last", steps=5)
    expected = {**summary(undisturbed), "checkpoint": str(folder / "checkpoints" / "step-00000005.ckpt")}
    assert summary(folder) == expected
    for name in ("average.ckpt", "best.ckpt"):
        assert same_weights(folder / "checkpoints" / name, undisturbed / "checkpoints" / name), name
    values, wanted = read_scalars(folder), read_scalars(undisturbed)
    for tag in ("train/loss", "val/loss", "average/loss"):
        assert values[tag] == wanted[tag], tag


def test_a_validation_by_epochs_that_a_kill_has_prevented_is_made_up(corpus, monkeypatch):
    epochs = (
        "--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1.0", "--trainer.limit_train_batches=3",
        "--trainer.limit_val_batches=1", "--checkpoint.every_n_steps=1",
    )  # fmt: skip
    starts = "leanbert.callbacks.reporting.report.StartReport.on_validation_start"
    killed(monkeypatch, corpus, *epochs, steps=7, at=starts, call=2)
    assert TaskRuns(str(corpus / "runs"), "mlm").find("last").checkpoint["global_step"] == 3
    fit(corpus, *epochs, "--ckpt_path=last", steps=7)
    assert set(read_scalars(run_folder(corpus))["val/loss"]) == {0, 3, 6, 7}


def test_a_finished_run_stays_finished(corpus, capsys):
    fit(corpus, *OFTEN, steps=3)
    before = (run_folder(corpus) / "summary.json").stat().st_mtime_ns
    fit(corpus, *OFTEN, "--ckpt_path=last", steps=3)
    assert "Finished: step 3" in capsys.readouterr().err
    assert (run_folder(corpus) / "summary.json").stat().st_mtime_ns == before


def test_a_run_without_a_checkpoint_is_started_again_there(corpus, monkeypatch, capsys):
    fit(corpus, *OFTEN, steps=2)
    killed(monkeypatch, corpus, *OFTEN, steps=3, at="leanbert.tasks.base.Task.training_step")
    assert not list(run_folder(corpus, 1).glob("checkpoints/*"))
    capsys.readouterr()
    fit(corpus, *OFTEN, "--ckpt_path=last", steps=3)
    assert f"last: {run_folder(corpus, 1)} was stopped before its first checkpoint" in capsys.readouterr().err
    assert summary(run_folder(corpus, 1))["steps"] == 3
    assert summary(run_folder(corpus))["steps"] == 2
    values = read_scalars(run_folder(corpus, 1))
    assert set(values["train/loss"]) == {1, 2, 3}
    assert set(values["val/loss"]) == {0, 2, 3}
    assert not (corpus / "runs" / "mlm" / "version_2").exists()


def test_auto_starts_and_then_goes_on(corpus):
    for steps in (2, 4):
        fit(corpus, *OFTEN, "--ckpt_path=auto", steps=steps)
    assert summary(run_folder(corpus))["steps"] == 4
    assert not run_folder(corpus, 1).exists()


def test_a_refused_run_leaves_no_folder(corpus):
    with pytest.raises(UserError, match=r"checkpoint\.monitor"):
        fit(corpus, *OFTEN, "--checkpoint.monitor=val/none", steps=2)
    assert not run_folder(corpus).exists()
    assert TaskRuns(str(corpus / "runs"), "mlm").create().folder == run_folder(corpus)


def test_a_run_that_is_trained_is_not_resumed(corpus):
    fit(corpus, *OFTEN, steps=2)
    other = Run(run_folder(corpus))
    other.lock()
    try:
        for path in ("last", "auto", "best", run_folder(corpus) / "checkpoints" / "step-00000002.ckpt"):
            with pytest.raises(UserError, match="version_0: another process is training this run"):
                fit(corpus, *OFTEN, f"--ckpt_path={path}", steps=4)
    finally:
        other.release()
    fit(corpus, *OFTEN, "--ckpt_path=last", steps=4)


LOGGERS = {
    "none": ["--trainer.logger=false"],
    "csv": ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir={logs}"],
    "two": ["--trainer.logger+=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir={logs}",
            "--trainer.logger+=lightning.pytorch.loggers.TensorBoardLogger", "--trainer.logger.save_dir={logs}"],
}  # fmt: skip


@pytest.mark.parametrize("logger", LOGGERS)
def test_the_folder_is_the_same_whatever_the_logger(corpus, logger, capsys):
    settings = [argument.format(logs=corpus / "logs") for argument in LOGGERS[logger]]
    fit(corpus, *OFTEN, *settings, steps=2)
    folder = run_folder(corpus)
    for name in ("config.yaml", "summary.json", "tokenizer/tokenizer.json", "checkpoints/step-00000002.ckpt"):
        assert (folder / name).is_file(), name
    assert f"Checkpoint   {folder / 'checkpoints' / 'step-00000002.ckpt'}" in capsys.readouterr().err
    fit(corpus, *OFTEN, *settings, "--ckpt_path=last", steps=4)
    assert summary(folder)["steps"] == 4
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]


def best_of(folder):
    return checkpoints.load(folder / "checkpoints" / "best.ckpt")["global_step"]


def test_the_best_is_known_by_the_folder_and_not_by_its_name(corpus, monkeypatch):
    """After a move, or with the root given in another way, it is neither forgotten nor overwritten by a worse one."""
    worse = ("--model.optimizer.lr=0.0", "--trainer.max_steps=8")
    fit(corpus, *OFTEN, steps=4)
    step, content = best_of(run_folder(corpus)), (run_folder(corpus) / "checkpoints" / "best.ckpt").read_bytes()
    (corpus / "runs").rename(corpus / "moved")
    monkeypatch.setattr(RunCheckpoint, "on_validation_end", worsened(RunCheckpoint.on_validation_end))
    work = os.getcwd()
    root = os.path.relpath(corpus / "moved", work)
    fit(corpus, *OFTEN, f"--trainer.default_root_dir={root}", "--ckpt_path=last", *worse)
    folder = corpus / "moved" / "mlm" / "version_0"
    assert summary(folder)["steps"] == 8
    assert best_of(folder) == step
    assert (folder / "checkpoints" / "best.ckpt").read_bytes() == content


def worsened(hook):
    def on_validation_end(self, trainer, module):
        trainer.callback_metrics["val/loss"] = torch.tensor(99.0)
        hook(self, trainer, module)

    return on_validation_end


def test_another_metric_has_another_best(corpus):
    state = RunCheckpoint().state_dict() | {"best": 0.5}
    same, other, turned = RunCheckpoint(), RunCheckpoint(monitor="val/accuracy"), RunCheckpoint(mode="max")
    for callback in (same, other, turned):
        callback.load_state_dict(state)
    assert (same.best, other.best, turned.best) == (0.5, None, None)


def test_what_is_later_or_damaged_steps_aside(tmp_path):
    state = {"leanbert": {}, "state_dict": {}}
    for name, step in [("step-00000003", 3), ("step-00000006", 6), ("best", 6), ("average", 2)]:
        checkpoints.save({**state, "global_step": step}, tmp_path / f"{name}.ckpt")
    (tmp_path / "step-00000009.ckpt").mkdir()
    (tmp_path / "abandoned-step-00000009.ckpt").touch()
    clear_for(tmp_path, 3)
    left = {"average.ckpt", "step-00000003.ckpt"}
    aside = {"abandoned-best.ckpt", "abandoned-step-00000006.ckpt", "abandoned-step-00000009.ckpt"}
    assert {path.name for path in tmp_path.iterdir()} == left | aside
    (tmp_path / "average.ckpt").write_bytes(b"cut")
    clear_for(tmp_path, 3)
    assert not (tmp_path / "average.ckpt").exists()


def test_a_file_that_is_read_is_not_deleted(tmp_path):
    path = Path(tmp_path, "step-00000003.ckpt")
    path.touch()
    if os.fork() == 0:
        os._exit(0 if checkpoints.hold(path) else 1)
    os.wait()
    assert checkpoints.hold(path)
    checkpoints.remove(path)
    assert path.exists()
    checkpoints._held.pop().close()
    checkpoints.remove(path)
    assert not path.exists()
    assert not checkpoints.hold(path)
