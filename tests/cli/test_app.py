"""The program as a user runs it: subprocesses, exit codes, what is printed and what is left on disk."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import leanbert
from leanbert.optim.build import ScheduleConfig, learning_rate_factor
from tests import launcher
from tests.corpus import write_corpus
from tests.tiny import whole_rows
from tests.training import TINY
from tests.training import read_scalars as scalars

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("launcher_socket")


def command(program, subcommand, *arguments):
    return [sys.executable, str(program), subcommand, "--config", "configs/mlm.yaml", *arguments]


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def run(folder, *arguments, expect=0, program=launcher.__file__, **kwargs):
    result = subprocess.run(
        command(program, *arguments), cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=300, **kwargs
    )  # fmt: skip
    assert result.returncode == expect, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train.txt")
    return folder


@pytest.fixture(scope="module")
def trained(corpus):
    """A finished run of 30 steps, validated every 10, and what it printed."""
    result = run(
        corpus, "fit", *TINY, "--data.train_files=train.txt", "--trainer.max_steps=30",
        "--trainer.val_check_interval=10", "--checkpoint.every_n_steps=7",
    )  # fmt: skip
    return corpus / "runs" / "mlm" / "version_0", result


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
    assert summary["tokens_per_second"] > 0
    assert summary["checkpoint"].endswith("step-00000030.ckpt")
    model = leanbert.load(trained[0]).model
    assert summary["parameters"] == model.num_parameters


def test_validate_gives_the_same_loss_again(trained, corpus):
    result = run(corpus, "validate", *TINY, "--data.train_files=train.txt", "--ckpt_path=last")
    metrics = json.loads(result.stdout)
    assert metrics["val/loss"] == pytest.approx(scalars(trained[0])["val/loss"][30], abs=1e-6)


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


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_plan_that_starts_from_a_model_has_its_architecture(trained, corpus, kind):
    source = trained[0] / "checkpoints" / "step-00000030.ckpt"
    if kind == "folder":
        leanbert.load(source).export(corpus / "planned")
        source = corpus / "planned"
    files = ["--data.train_files=train.txt", f"--model.init_from={source}", "--json=plan.json"]
    run(corpus, "plan", "--config=configs/size/small.yaml", *files)
    planned, summary = (json.loads(path.read_text()) for path in (corpus / "plan.json", trained[0] / "summary.json"))
    assert planned["parameters"] == summary["parameters"]


def test_prepare_builds_what_fit_then_finds(tmp_path):
    write_corpus(tmp_path / "train.txt")
    settings = [*TINY, "--data.train_files=train.txt", "--data.cache_dir=cache"]
    run(tmp_path, "prepare", *settings, "--trainer.accelerator=gpu")  # a login node has none
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")}
    assert made
    assert not (tmp_path / "runs").exists()
    run(tmp_path, "fit", *settings, "--trainer.max_steps=1")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bin")} == made


@pytest.mark.parametrize("name", ["mini", "small", "base", "large"])
def test_print_config_takes_the_size(tmp_path, name):
    result = run(tmp_path, "fit", "--config", f"configs/size/{name}.yaml", "--print_config")
    sizes = {"mini": (4, 256), "small": (4, 512), "base": (12, 768), "large": (24, 1024)}[name]
    assert f"num_layers: {sizes[0]}\n" in result.stdout
    assert f"hidden_size: {sizes[1]}\n" in result.stdout


def test_help_and_mistakes_name_all_subcommands(tmp_path):
    names = ("fit", "validate", "test", "predict", "prepare", "plan", "export")
    for arguments, code in (["--help"], 0), (["fti"], 2):
        result = subprocess.run(
            [sys.executable, launcher.__file__, *arguments], cwd=tmp_path, env=environment(), capture_output=True,
            text=True,
        )  # fmt: skip
        assert result.returncode == code
        assert all(name in result.stdout + result.stderr for name in names)


# ---- interrupted and resumed

RESUME = [
    *TINY, "--data.train_files=train.txt", "--trainer.max_steps=24", "--trainer.val_check_interval=6",
    "--checkpoint.every_n_steps=3", "--model.encoder.dropout=0.1",
    "--model.encoder.attention_dropout=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(corpus):
    run(corpus, "fit", *RESUME, "--trainer.default_root_dir=undisturbed")
    return scalars(corpus / "undisturbed" / "mlm" / "version_0")


def start(corpus, *arguments):
    """Start a process of its own, which signals reach."""
    return subprocess.Popen(
        command(launcher.PROGRAM, *arguments), cwd=corpus, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def same_losses(expected, actual):
    for tag in ("train/loss", "train/learning_rate", "val/loss", "val/accuracy"):
        assert actual[tag] == expected[tag], tag


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seen", [6, 15])  # right after a validation is due, and in the middle
def test_a_killed_run_goes_on_as_if_nothing_had_happened(corpus, undisturbed, workers, seen):
    root = f"killed-{workers}-{seen}"
    settings = [*RESUME, f"--trainer.default_root_dir={root}", f"--data.num_workers={workers}"]
    process = start(corpus, "fit", *settings)
    checkpoints = corpus / root / "mlm" / "version_0" / "checkpoints"
    wait_for(checkpoints / f"step-{seen:08d}.ckpt", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkpoints / "step-00000024.ckpt").exists(), "killed too late to test anything"
    run(corpus, "fit", *settings, "--ckpt_path=last")
    assert [path.name for path in (corpus / root / "mlm").iterdir()] == ["version_0"]
    same_losses(undisturbed, scalars(corpus / root / "mlm" / "version_0"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_that_goes_on(corpus, undisturbed, number):
    settings = [*RESUME, f"--trainer.default_root_dir=interrupted-{number}"]
    process = start(corpus, "fit", *settings)
    folder = corpus / f"interrupted-{number}" / "mlm" / "version_0"
    wait_for(folder / "checkpoints" / "step-00000003.ckpt", process)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert errors.strip().splitlines()[-1].strip().endswith("--ckpt_path last"), errors
    assert "Traceback" not in errors
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    run(corpus, "fit", *settings, "--ckpt_path=last")
    same_losses(undisturbed, scalars(folder))
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_a_finished_run_is_extended(corpus):
    """Rates are those of the longer schedule at each step, the losses those of a run with these rates."""
    schedule = ["--model.schedule.name=constant", "--model.schedule.warmup_steps=2"]
    settings = [*RESUME, *schedule, "--trainer.default_root_dir=extended"]
    run(corpus, "fit", *settings, "--trainer.max_steps=8")
    run(corpus, "fit", *settings, "--trainer.max_steps=12", "--ckpt_path=last")
    run(corpus, "fit", *settings, "--trainer.max_steps=12", "--trainer.default_root_dir=straight")
    extended = scalars(corpus / "extended" / "mlm" / "version_0")["train/loss"]
    assert extended == scalars(corpus / "straight" / "mlm" / "version_0")["train/loss"]
    assert set(extended) == set(range(1, 13))


def test_an_extended_run_takes_the_rates_of_the_longer_schedule(corpus):
    settings = [*RESUME, "--model.schedule.warmup_steps=2", "--trainer.default_root_dir=stretched"]
    run(corpus, "fit", *settings, "--trainer.max_steps=6")
    run(corpus, "fit", *settings, "--trainer.max_steps=20", "--ckpt_path=last", "--model.optimizer.lr=1e-3")
    rates = scalars(corpus / "stretched" / "mlm" / "version_0")["train/learning_rate"]
    config = ScheduleConfig(warmup_steps=2)
    expected = [3e-3 * learning_rate_factor(config, step, 6) for step in range(6)]
    expected += [1e-3 * learning_rate_factor(config, step, 20) for step in range(6, 20)]
    assert [rates[step] for step in range(1, 21)] == pytest.approx(expected)


def test_a_finished_run_is_left_as_it_is(trained, corpus):
    before = {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()}
    fit = ["fit", *TINY, "--data.train_files=train.txt", "--trainer.max_steps=30"]
    assert "Finished: step 30" in run(corpus, *fit, "--ckpt_path=last").stderr
    assert {path: path.read_bytes() for path in trained[0].rglob("*") if path.is_file()} == before


def test_going_back_sets_later_checkpoints_aside(corpus):
    settings = [*RESUME, "--trainer.default_root_dir=back", "--trainer.max_steps=9", "--checkpoint.keep=3"]
    run(corpus, "fit", *settings)
    folder = corpus / "back" / "mlm" / "version_0" / "checkpoints"
    run(corpus, "fit", *settings, f"--ckpt_path={folder / 'step-00000003.ckpt'}", "--trainer.max_steps=5")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "abandoned-best.ckpt", "abandoned-step-00000006.ckpt", "abandoned-step-00000009.ckpt", "best.ckpt",
        "step-00000003.ckpt", "step-00000005.ckpt",
    ]  # fmt: skip


def test_a_saved_config_serves_every_subcommand(trained, corpus):
    config = f"--config={trained[0] / 'config.yaml'}"
    for arguments in (["prepare"], ["validate", "--ckpt_path=best"], ["export", "--ckpt_path=best", "--output=again"]):
        run(corpus, arguments[0], config, *arguments[1:])
    assert not (corpus / "runs" / "config.yaml").exists()


def test_an_average_answers_like_other_checkpoints(corpus):
    settings = [*TINY, "--data.train_files=train.txt", "--trainer.default_root_dir=averaged"]
    result = run(
        corpus, "fit", *settings, "--trainer.max_steps=4", "--trainer.val_check_interval=2",
        "--checkpoint.average_last=2", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp",
    )  # fmt: skip
    folder = corpus / "averaged" / "mlm" / "version_0"
    assert "average of the weights after steps 2, 4" in result.stderr
    assert f"Average      {Path('averaged') / 'mlm' / 'version_0' / 'checkpoints' / 'average.ckpt'}" in result.stderr
    stated = json.loads((folder / "summary.json").read_text())["metrics"]["average/loss"]
    average = [*settings, "--ckpt_path=average", "--trainer.accelerator=cpu"]
    assert json.loads(run(corpus, "validate", *average).stdout)["val/loss"] == pytest.approx(stated, abs=1e-6)
    (corpus / "question.txt").write_text("the [MASK] sat\n")
    answer = json.loads(run(corpus, "predict", *average, "--data.predict_files=question.txt").stdout)
    run(corpus, "export", *average, "--output=average")
    for source in (corpus / "average", folder / "checkpoints" / "average.ckpt"):
        ours = leanbert.load(source).fill_mask(["the [MASK] sat"])[0]["masks"][0]
        for mine, theirs in zip(ours, answer["masks"][0], strict=True):
            assert mine["token"] == theirs["token"]
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-6)
    refused(corpus, "fit", *average, "--trainer.max_steps=8", says=["average.ckpt", "weights only", "model.init_from"])


def test_two_processes_train_as_one(corpus):
    settings = [*TINY, "--data.train_files=train.txt", "--trainer.max_steps=6"]
    run(corpus, "fit", *settings, "--trainer.default_root_dir=one")
    run(
        corpus, "fit", *settings, "--trainer.default_root_dir=two", "--trainer.accelerator=cpu",
        "--trainer.devices=2", "--trainer.strategy=ddp",
    )  # fmt: skip
    one, two = (scalars(corpus / root / "mlm" / "version_0") for root in ("one", "two"))
    for tag in ("train/loss", "val/loss", "val/unigram_loss"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-5), tag


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


def test_compiled_blocks_train(corpus):
    run(
        corpus, "fit", *TINY, "--data.train_files=train.txt", "--model.compile=true", "--trainer.max_steps=3",
        "--trainer.default_root_dir=compiled",
    )  # fmt: skip
    losses = scalars(corpus / "compiled" / "mlm" / "version_0")["train/loss"]
    eager = ["--trainer.max_steps=3", "--trainer.default_root_dir=eager"]
    run(corpus, "fit", *TINY, "--data.train_files=train.txt", *eager)
    assert losses == pytest.approx(scalars(corpus / "eager" / "mlm" / "version_0")["train/loss"], abs=0.02)


# ---- bad input: one line, exit code 2, the setting and the fix


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb",))


def refused(folder, *arguments, says):
    result = run(folder, *arguments, expect=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.strip().splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    for text in says:
        assert text in lines[0], lines[0]
    return lines[0]


SETTINGS = [
    (["--trainer.accumulate_grad_batches=2"], ["trainer.accumulate_grad_batches", "data.batch_size"]),
    (["--model.optimizer.name=lion"], ["model.optimizer", "adamw", "lion"]),
    (["--model.encoder.hidden_size=30", "--model.encoder.num_heads=4"], ["hidden_size", "30", "4"]),
    (["--data.max_length=1024"], ["data.max_length", "1024", "512"]),
    (["--data.no_such_setting=1"], ["no_such_setting"]),
    (["--data.mask_rate=1.5"], ["data.mask_rate", "1.5"]),
    (["--data.train_files=nowhere/*.txt"], ["nowhere/*.txt"]),
    (["--ckpt_path=none.ckpt"], ["none.ckpt"]),
    (["--ckpt_path=last"], ["--ckpt_path last"]),
    (["--checkpoint.keep=0"], ["checkpoint.keep"]),
    (["--data.mask_rate=null"], ["data.mask_rate", "null"]),
    (["--config=configs/srl.yaml", "--data.init_args.vocab_size=null"], ["data.vocab_size", "null"]),
    (["--model.encoder.num_layers=null"], ["model.encoder.num_layers", "None"]),
    (["--ckpt_path=2"], ["2: no such checkpoint"]),
    (["--model.optimizer.lr=-1"], ["model.optimizer.lr", "-1"]),
    (["--model.schedule.decay_share=2"], ["model.schedule.decay_share", "2"]),
    (["--trainer.enable_checkpointing=false"], ["trainer.enable_checkpointing", "checkpoint.every_n_steps"]),
    (["--config=configs/none.yaml"], ["configs/none.yaml", "configs/mlm.yaml"]),
    (["--trainer.accelerator=gpu"], ["gpu"]),
    (["--trainer.accelerator=abacus"], ["trainer.accelerator", "abacus", "cpu"]),
    (["--trainer.strategy=fsdp"], ["trainer.strategy", "fsdp", "ddp"]),
    (["--trainer.strategy=magic"], ["trainer.strategy", "magic"]),
    (["--trainer.strategy=ddp_spawn"], ["trainer.strategy", "ddp_spawn"]),
    (
        ["--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy", "--trainer.devices=2"],
        ["trainer.strategy", "ModelParallelStrategy"],
    ),
    (["--model=lightning.pytorch.demos.boring_classes.BoringModel"], ["model.class_path", "BoringModel", "Task"]),
    (["--trainer.default_root_dir="], ["trainer.default_root_dir"]),
    (["--trainer.default_root_dir=/proc/leanbert"], ["/proc/leanbert"]),
    ([f"--trainer.default_root_dir={'x' * 5000}"], ["trainer.default_root_dir"]),
    (["--trainer.default_root_dir=~nosuchuser/x"], ["trainer.default_root_dir", "nosuchuser"]),
]


@pytest.mark.parametrize(("arguments", "says"), SETTINGS, ids=lambda value: value[0] if len(value) == 1 else "")
def test_bad_settings(tmp_path, arguments, says):
    write_corpus(tmp_path / "train.txt")
    refused(tmp_path, "fit", *TINY, "--data.train_files=train.txt", *arguments, says=says)


def test_yaml_that_does_not_parse_and_unknown_keys(tmp_path):
    (tmp_path / "broken.yaml").write_text("trainer:\n  max_steps: [1\n")
    refused(tmp_path, "fit", "--config=broken.yaml", says=["broken.yaml"])
    (tmp_path / "unknown.yaml").write_text("trainer:\n  max_stepz: 1\n")
    refused(tmp_path, "fit", "--config=unknown.yaml", says=["max_stepz"])
    overlay = "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
    (tmp_path / "overlay.yaml").write_text(overlay)
    refused(tmp_path, "fit", "--config=overlay.yaml", "--config=overlay.yaml", says=["LearningRateMonitor", "2 times"])


def test_yaml_that_grows_without_bound(tmp_path):
    laughs = ["a0: &a0 [1, 2, 3]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    texts = {"deep": f"trainer: {'[' * 3000}{']' * 3000}\n", "round": "trainer: &a [*a]\n", "laughs": "\n".join(laughs)}
    for name, reason in ("deep", "nested too deeply"), ("round", "nested too deeply"), ("laughs", "aliases"):
        (tmp_path / f"{name}.yaml").write_text(texts[name])
        refused(tmp_path, "fit", f"--config={name}.yaml", says=[f"{name}.yaml", reason])


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
