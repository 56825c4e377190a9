"""The program as a user runs it: subprocesses, exit codes, what is printed and what is left on disk."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import leanbert
from leanbert.cli.app import quiet_libraries
from leanbert.measure.counters import device_name
from tests import launcher
from tests.cli.program import command, environment, refused, run
from tests.corpus import write_corpus
from tests.tiny import whole_rows
from tests.training import TINY
from tests.training import read_scalars as scalars

pytestmark = pytest.mark.usefixtures("launcher_socket")


def test_fit_prints_a_report_and_how_to_go_on(trained):
    _, result = trained
    assert result.stdout == ""
    for text in ("documents", "unknown", "real tokens", "parameters", "precision", "epochs", "about"):
        assert text in result.stderr, text
    last_lines = result.stderr.strip().splitlines()[-4:]
    assert "val/loss" in last_lines[0]
    assert "unigram" in last_lines[0]
    assert str(Path("runs") / "mlm" / "version_0" / "checkpoints" / "step-00000030.ckpt") in last_lines[1]
    assert "tensorboard --logdir runs" in last_lines[2]
    assert "--data.predict_files -" in last_lines[3]


def test_the_run_folder_is_whole(trained):
    folder, _ = trained
    assert (folder / "config.yaml").is_file()
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"step-00000028.ckpt", "step-00000030.ckpt", "best.ckpt"}


def test_tensorboard_holds_the_tags_of_the_contract(trained):
    values = scalars(trained[0])
    assert set(values["val/loss"]) == {0, 10, 20, 30}
    assert set(values["val/perplexity"]) == set(values["val/accuracy"]) == {0, 10, 20, 30}
    for tag in ("train/loss", "train/learning_rate", "train/tokens_per_second", "memory/rss_mib"):
        assert set(values[tag]) == set(range(1, 31)), tag
    assert values["val/loss"][30] < values["val/loss"][0]
    events = EventAccumulator(str(trained[0])).Reload()
    assert "samples/filled_masks/text_summary" in events.Tags()["tensors"]


def test_summary_json(trained):
    summary = json.loads((trained[0] / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 30
    assert summary["tokens"] == 30 * 8 * 32
    assert summary["effective_batch_sequences"] == summary["micro_batch_sequences"] == 8
    assert summary["metrics"]["val/loss"] == pytest.approx(scalars(trained[0])["val/loss"][30])
    assert summary["peak_rss_bytes"] > 100 * 2**20
    assert (summary["device"], summary["precision"]) == (device_name(torch.device("cpu")), "32-true")
    assert summary["tokens_per_second"] > 0
    assert summary["checkpoint"].endswith("step-00000030.ckpt")
    model = leanbert.load(trained[0]).model
    assert summary["parameters"] == model.num_parameters


def test_validate_gives_the_same_loss_again(trained, corpus):
    result = run(corpus, "validate", *TINY, "--data.train_files=train.txt", "--ckpt_path=last")
    metrics = json.loads(result.stdout)
    assert metrics["val/loss"] == pytest.approx(scalars(trained[0])["val/loss"][30], abs=1e-6)
    new = run(corpus, "validate", *TINY, "--data.train_files=train.txt")
    assert json.loads(new.stdout)["val/loss"] == pytest.approx(scalars(trained[0])["val/loss"][0], abs=1e-6)
    assert ["untrained" in each.stderr for each in (new, result)] == [True, False]


def test_a_task_without_a_test_says_what_to_use(trained, corpus):
    refused(corpus, "test", *TINY, "--ckpt_path=last", says=["test: MaskedLM has no metrics but", "Use validate."])


def test_predict_from_a_file_and_from_standard_input(trained, corpus):
    lines = "the [MASK] sat\n\nno mask here\n[MASK] and [MASK]\n"
    (corpus / "lines.txt").write_text(lines)
    # the checkpoint says what the model is: its sizes need not be given again
    from_file = run(corpus, "predict", "--ckpt_path=best", "--data.predict_files=lines.txt")
    from_input = run(corpus, "predict", "--ckpt_path=best", "--data.predict_files=-", input=lines)
    assert from_file.stdout == from_input.stdout
    answers = [json.loads(line) for line in from_file.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == lines.splitlines()
    assert [len(answer["masks"]) for answer in answers] == [1, 0, 0, 2]
    candidates = answers[0]["masks"][0]
    assert len(candidates) == 5
    probabilities = [candidate["probability"] for candidate in candidates]
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1.0001


def test_load_answers_as_predict_does(trained, corpus):
    model = leanbert.load(trained[0])
    answer = model.fill_mask(["the [MASK] sat"], top_k=3)[0]
    assert len(answer["masks"][0]) == 3
    together = model.encode(["the cat sat", "a much longer text about the dog and the house"])
    alone = model.encode(["the cat sat"])
    assert together.shape == (2, 32)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)  # padding does not change an answer


def test_answers_do_not_depend_on_the_processor(trained, corpus):
    """They are in float32 unless asked, by the command line as from Python, where training is in bfloat16 or not."""
    (corpus / "line.txt").write_text("The [MASK] sold the bread.\n")
    arguments = ["predict", "--ckpt_path=last", "--data.predict_files=line.txt"]
    (answer,) = [json.loads(line) for line in run(corpus, *arguments).stdout.splitlines()]
    (expected,) = leanbert.load(trained[0] / "checkpoints" / "step-00000030.ckpt").fill_mask([answer["text"]])
    for mask, other in zip(answer["masks"][0], expected["masks"][0], strict=True):
        assert mask["token"] == other["token"]
        assert mask["probability"] == pytest.approx(other["probability"], abs=1e-6)
    asked = json.loads(run(corpus, *arguments, "--trainer.precision=bf16-mixed").stdout)["masks"][0]
    assert [mask["probability"] for mask in asked] != [mask["probability"] for mask in answer["masks"][0]]


@pytest.mark.slow
def test_standard_output_is_utf_8_and_where_it_takes_nothing_that_is_said(trained, corpus):
    (corpus / "lines.txt").write_text("The k\u00f6nig sold the [MASK].\n" * 300, encoding="utf-8")
    words = [sys.executable, str(launcher.PROGRAM), "predict", "--config=configs/mlm.yaml", "--ckpt_path=last",
             "--data.predict_files=lines.txt"]  # fmt: skip
    shell = f"{shlex.join(words)} | head -1; exit ${{PIPESTATUS[0]}}"
    ascii_only = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(["bash", "-c", shell], cwd=corpus, env=ascii_only, capture_output=True, check=False)
    assert json.loads(done.stdout.decode())["text"] == "The k\u00f6nig sold the [MASK]."
    assert (done.returncode, done.stderr.count(b"rror")) == (141, 0), done.stderr
    for target, reason in (">/dev/full", "output: the disk is full"), (">&-", "output: Bad file descriptor"):
        shell = f"{shlex.join(words)} {target}"
        done = subprocess.run(["bash", "-c", shell], cwd=corpus, env=environment(), capture_output=True, check=False)
        assert done.returncode == 2
        assert f"error: {reason}" in done.stderr.decode().splitlines()[-1]


def test_fast_dev_run_takes_a_step(corpus):
    run(
        corpus,
        "fit",
        *TINY,
        "--data.train_files=train.txt",
        "--trainer.fast_dev_run=true",
        "--trainer.default_root_dir=d",
    )


def test_export_loads_in_transformers_with_equal_logits(trained, corpus):
    transformers = pytest.importorskip("transformers")
    run(corpus, "export", "--ckpt_path=last", "--format=hf", "--output=exported")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(corpus / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus / "exported")
    ours = leanbert.load(trained[0] / "checkpoints" / "step-00000030.ckpt")
    encoded = tokenizer("the [MASK] sat on the house", return_tensors="pt")
    assert encoded["input_ids"].tolist() == ours.tokenizer.encode_batch(["the [MASK] sat on the house"])
    with torch.no_grad():
        expected = theirs(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        actual = ours.model(whole_rows(encoded["input_ids"]))
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4


def test_an_export_onto_a_full_disk_is_one_line_and_leaves_the_older_one(trained, corpus):
    command_line = ["export", "--ckpt_path=last", "--output=full"]
    run(corpus, *command_line)
    before = {path: path.read_bytes() for path in (corpus / "full").rglob("*") if path.is_file()}
    words = shlex.join(command(launcher.PROGRAM, *command_line))
    shell = ["bash", "-c", f"trap '' XFSZ; ulimit -f 20; {words}"]
    done = subprocess.run(shell, cwd=corpus, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "model.safetensors: cannot be written" in done.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in (corpus / "full").rglob("*") if path.is_file()} == before


def test_training_goes_on_from_an_exported_folder(trained, corpus):
    run(corpus, "export", "--ckpt_path=last", "--output=start")
    run(
        corpus, "fit", *TINY, "--data.train_files=train.txt", "--model.init_from=start", "--trainer.max_steps=1",
        "--trainer.default_root_dir=continued",
    )  # fmt: skip
    first = scalars(corpus / "continued" / "mlm" / "version_0")["val/loss"][0]
    assert first == pytest.approx(scalars(trained[0])["val/loss"][30], abs=1e-5)


@pytest.mark.parametrize("kind", ["file", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_plan_that_starts_from_a_model_has_its_architecture(trained, corpus, kind):
    source = trained[0] / "checkpoints" / "step-00000030.ckpt"
    if kind == "folder":
        leanbert.load(source).export(corpus / "planned")
        source = corpus / "planned"
    files = ["--data.train_files=train.txt", f"--model.init_from={source}", "--json=plan.json"]
    said = run(corpus, "plan", "--config=configs/size/small.yaml", *files).stderr
    assert f"model.init_from: {source} has 2 layers of 32; of model.encoder only dropout counts\n" in said
    planned, summary = (json.loads(path.read_text()) for path in (corpus / "plan.json", trained[0] / "summary.json"))
    assert planned["parameters"] == summary["parameters"]


def test_prepare_builds_what_fit_then_finds(tmp_path):
    write_corpus(tmp_path / "train.txt")
    settings = [*TINY, "--data.train_files=train.txt", "--data.cache_dir=cache"]
    prepared = run(tmp_path, "prepare", *settings, "--trainer.accelerator=gpu")  # a login node has none
    lines = [line for line in prepared.stderr.splitlines() if line.startswith(("train ", "val "))]
    assert prepared.stdout == ""
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert made
    assert not (tmp_path / "runs").exists()
    trained = run(tmp_path, "fit", *settings, "--trainer.max_steps=1").stderr.splitlines()
    assert len(lines) == 2
    assert set(lines) <= set(trained)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")} == made


def test_a_finished_run_is_left_as_it_is(trained, corpus):
    before = {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()}
    fit = ["fit", *TINY, "--data.train_files=train.txt", "--trainer.max_steps=30"]
    assert "Finished: step 30" in run(corpus, *fit, "--ckpt_path=last").stderr
    assert {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()} == before


def test_a_saved_config_serves_every_subcommand(trained, corpus):
    config = f"--config={trained[0] / 'config.yaml'}"
    for arguments in (["prepare"], ["validate", "--ckpt_path=best"], ["export", "--ckpt_path=best", "--output=again"]):
        run(corpus, arguments[0], config, *arguments[1:])
    assert not (corpus / "runs" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_average_answers_like_other_checkpoints(corpus, strategy):
    settings = [*TINY, "--data.train_files=train.txt", f"--trainer.default_root_dir=averaged-{strategy}"]
    result = run(
        corpus, "fit", *settings, "--trainer.max_steps=4", "--trainer.val_check_interval=2",
        "--checkpoint.average_last=2", "--trainer.accelerator=cpu", "--trainer.devices=2",
        f"--trainer.strategy={strategy}",
    )  # fmt: skip
    folder = corpus / f"averaged-{strategy}" / "mlm" / "version_0"
    assert "average of the weights after steps 2, 4" in result.stderr
    written = Path(f"averaged-{strategy}") / "mlm" / "version_0" / "checkpoints" / "average.ckpt"
    assert f"Average      {written}" in result.stderr
    stated = json.loads((folder / "summary.json").read_text())["metrics"]["average/loss"]
    average = [*settings, "--ckpt_path=average", "--trainer.accelerator=cpu"]
    assert json.loads(run(corpus, "validate", *average).stdout)["val/loss"] == pytest.approx(stated, abs=1e-6)
    (corpus / "question.txt").write_text("the [MASK] sat\n")
    answer = json.loads(run(corpus, "predict", *average, "--data.predict_files=question.txt").stdout)
    run(corpus, "export", *average, f"--output=average-{strategy}")
    for source in (corpus / f"average-{strategy}", folder / "checkpoints" / "average.ckpt"):
        ours = leanbert.load(source).fill_mask(["the [MASK] sat"])[0]["masks"][0]
        for mine, theirs in zip(ours, answer["masks"][0], strict=True):
            assert mine["token"] == theirs["token"]
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-6)
    refused(corpus, "fit", *average, "--trainer.max_steps=8", says=["average.ckpt", "weights only", "model.init_from"])


@pytest.mark.slow
def test_two_processes_train_as_one(corpus):
    adamw = ("--model.optimizer.name=adamw", "--model.optimizer.lr=1e-3")  # Muon multiplies in bfloat16, where it can
    settings = [*TINY, *adamw, "--data.train_files=train.txt", "--trainer.max_steps=6"]
    run(corpus, "fit", *settings, "--trainer.default_root_dir=one")
    run(
        corpus, "fit", *settings, "--trainer.default_root_dir=two", "--trainer.accelerator=cpu",
        "--trainer.devices=2", "--trainer.strategy=ddp",
    )  # fmt: skip
    one, two = (scalars(corpus / root / "mlm" / "version_0") for root in ("one", "two"))
    for tag in ("train/loss", "val/loss", "val/unigram_loss"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-5), tag
    of_one = ["--ckpt_path=last", "--trainer.default_root_dir=one"]
    run(corpus, "export", *of_one, "--format=onnx", "--output=one-onnx")
    for source in (of_one, ["--ckpt_path=one-onnx"]):
        result = run(
            corpus, "validate", *TINY, "--data.train_files=train.txt", *source, "--trainer.accelerator=cpu",
            "--trainer.devices=2", "--trainer.strategy=ddp",
        )  # fmt: skip
        assert json.loads(result.stdout)["val/loss"] == pytest.approx(one["val/loss"][6], rel=1e-5)


@pytest.mark.slow
def test_a_process_without_a_validation_row_waits_for_nothing(corpus):
    record = {"tokens": ["Ada", "left"], "predicate": 1, "labels": ["B-A0", "B-V"]}
    for part, count in (("train", 8), ("val", 1)):
        (corpus / f"{part}.jsonl").write_text(f"{json.dumps(record)}\n" * count)
    files = [f"--data.{part}_files={part}.jsonl" for part in ("train", "val")]
    result = run(
        corpus, "fit", "--config=configs/srl.yaml", *TINY, *files, "--trainer.default_root_dir=few",
        "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp",
    )  # fmt: skip
    assert "before the ``update``" not in result.stderr  # torchmetrics, of a rank without a batch
    assert set(scalars(corpus / "few" / "srl" / "version_0")["val/f1"]) == {0, 1}


@pytest.mark.slow
def test_compiled_blocks_train(corpus):
    run(
        corpus, "fit", *TINY, "--data.train_files=train.txt", "--model.compile=true", "--trainer.max_steps=3",
        "--trainer.default_root_dir=compiled",
    )  # fmt: skip
    losses = scalars(corpus / "compiled" / "mlm" / "version_0")["train/loss"]
    eager = ["--trainer.max_steps=3", "--trainer.default_root_dir=eager"]
    run(corpus, "fit", *TINY, "--data.train_files=train.txt", *eager)
    assert losses == pytest.approx(scalars(corpus / "eager" / "mlm" / "version_0")["train/loss"], abs=0.02)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb",))


def test_bad_checkpoints(trained, corpus):
    checkpoint = trained[0] / "checkpoints" / "step-00000030.ckpt"
    fit = ["fit", *TINY, "--data.train_files=train.txt", "--trainer.max_steps=40"]
    before = sorted(path.name for path in trained[0].parent.iterdir())
    (corpus / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    refused(corpus, *fit, "--ckpt_path=cut.ckpt", says=["cut.ckpt", "damaged"])
    torch.save({"leanbert": {}, "state_dict": {}, "x": Bomb()}, corpus / "bomb.ckpt")
    refused(corpus, *fit, "--ckpt_path=bomb.ckpt", says=["bomb.ckpt", "execute code"])
    (corpus / "pickle.ckpt").write_bytes(pickle.dumps(Bomb()))
    refused(corpus, *fit, "--ckpt_path=pickle.ckpt", says=["pickle.ckpt"])
    assert not (corpus / "bomb").exists()
    assert sorted(path.name for path in trained[0].parent.iterdir()) == before


def test_a_checkpoint_of_another_shape(trained, corpus):
    says = ["model.encoder.hidden_size", "64", "32"]
    settings = [*TINY, "--model.encoder.hidden_size=64", "--data.train_files=train.txt", "--ckpt_path=last"]
    before = {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()}
    refused(corpus, "fit", *settings, "--trainer.max_steps=40", says=says)
    assert {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("quiet", [False, True])
def test_where_slurm_is_installed_nobody_is_asked_to_use_it(monkeypatch, quiet):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if quiet:
            quiet_libraries()
        SLURMEnvironment._validate_srun_used()  # as every trainer does
    assert bool(found) is not quiet
