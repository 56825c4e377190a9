"""A student whose teacher ran once, before the first step, learns the same."""

import copy
import gc
import json
import random
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import leanbert
from leanbert.cli.app import CLI, quiet_libraries
from leanbert.compression.teacher_outputs import make_outputs
from leanbert.data.classification import ClassificationData
from leanbert.data.mlm import MaskedLMData
from leanbert.errors import UserError
from leanbert.measure.trace import LiveBytes
from leanbert.memory.step import optimizer_step
from leanbert.planning.predict import predict
from leanbert.planning.run_settings import RunSettings
from leanbert.planning.timing import measure
from leanbert.tasks.classification import TextClassification
from leanbert.tasks.distillation import Distillation
from leanbert.tasks.mlm import MaskedLM
from leanbert.tasks.teachers import DistillationConfig
from tests.cli.program import ROOT
from tests.corpus import OBJECTS, SUBJECTS, VERBS
from tests.distributed.launching import PROGRAM, started
from tests.pretrained.pairs import packed_batch, tiny_seq2seq
from tests.tasks.test_distillation import ALL, Nothing, Plain, assert_same_step, mlm_pair, seq2seq_pair
from tests.training import PLAIN, TINY, fit, read_scalars, scalars


def pointer_pair():
    return tiny_seq2seq(layers=1, copy=True), tiny_seq2seq(seed=1, layers=2, copy=True), packed_batch()


def step_of(student, teacher, batch, folder=None, micro_batch=None, **config):
    """Loss and gradients of a step; with a folder the teacher runs before, three rows at a time."""
    torch.manual_seed(5)
    task, teacher = Plain(copy.deepcopy(student)), copy.deepcopy(teacher)
    distillation = Distillation(DistillationConfig(teacher="t", **{**ALL, **config}), teacher, task)
    distillation.projections.double()
    if folder is not None:
        parts = batch.split(3)
        run = lambda rows: distillation.outputs(task.model_inputs(parts[rows[0] // 3]))  # noqa: E731
        distillation.keep(make_outputs(folder, len(batch), 3, run))
        assert any(weight.is_meta for weight in teacher.parameters())
    batch.row_numbers = [*range(len(batch))]
    optimizer = Nothing([*task.model.parameters(), *distillation.projections.parameters()])
    return optimizer_step(distillation, batch, optimizer, micro_batch=micro_batch), optimizer.gradients


@pytest.mark.parametrize("pair", [mlm_pair, seq2seq_pair, pointer_pair])
@pytest.mark.parametrize("config", [{}, {"relations": 0.0}, {"hidden": 0.0, "relations": 0.0}, {"logits": 0.0}])
def test_a_step_is_that_with_the_teacher_in_memory(pair, config, tmp_path):
    student, teacher, batch = pair()
    for micro_batch in (None, 3):
        without = step_of(student, teacher, batch, micro_batch=micro_batch, **config)
        kept = step_of(student, teacher, batch, tmp_path / "teachers/a", micro_batch=micro_batch, **config)
        if micro_batch == 3:  # the shapes are those in which the teacher ran
            assert torch.equal(without[0], kept[0])
            assert all(torch.equal(a, b) for a, b in zip(without[1], kept[1], strict=True) if a is not None)
        else:
            assert_same_step(without, kept)
    assert ("hidden.bin" in {file.name for file in (tmp_path / "teachers/a").iterdir()}) == bool(
        config.get("logits", 1)
    )


def test_only_what_a_loss_reads_stays_of_the_teacher():
    """Of three blocks of 64 the head and its embedding, then queries, keys and values of the last too."""
    student, teacher, _ = mlm_pair()
    left = {}
    for relations in (0.0, 1.0):
        own = copy.deepcopy(teacher)
        config = DistillationConfig(teacher="t", hidden=1.0, relations=relations)
        distillation = Distillation(config, own, Plain(student))
        distillation.keep(None)
        left[relations] = {name for name, weight in own.named_parameters() if not weight.is_meta}
    head = {"encoder.embeddings.token.weight", "head.dense.weight", "head.norm.weight", "head.bias"}
    assert left[0.0] == head
    assert left[1.0] - head == {"encoder.blocks.2.attention.qkv.weight", "encoder.blocks.2.attention_norm.weight"}
    assert own.num_parameters == teacher.num_parameters


# ---- through the command line


def sentence(chance):
    return f"the {chance.choice(SUBJECTS)} {chance.choice(VERBS)} the {chance.choice(OBJECTS)}"


def examples(task, count=120):
    chance = random.Random(0)
    for _ in range(count):
        text = sentence(chance)
        words = text.split()
        if task == "classification":
            yield {"text": text, "label": words[1]}
        elif task == "tagging":
            yield {"tokens": words, "labels": ["O", "B-X", *["O"] * (len(words) - 3), "B-Y"]}
        else:
            yield {"source": text, "target": " ".join(reversed(words))}


CONFIGS = {"classification": "classification", "tagging": "tagging", "seq2seq": "translation"}


def run(folder, task, *more, steps=4):
    quiet_libraries()
    return CLI(arguments(folder, task, *more, steps=steps))


def arguments(folder, task, *more, steps):
    file = folder / "train.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(example) + "\n" for example in examples(task)))
        (folder / "plain.yaml").write_text(PLAIN)
    quick = ["--model.validation_sources=0"] if task == "seq2seq" else []
    return [
        "fit", f"--config=configs/{CONFIGS[task]}.yaml", f"--config={folder / 'plain.yaml'}", *TINY, *quick,
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", f"--data.train_files={file}",
        "--data.val_share=0.1", f"--data.cache_dir={folder / 'cache'}", "--data.batch_size=4",
        f"--trainer.default_root_dir={folder / 'runs'}", f"--trainer.max_steps={steps}", *more,
    ]  # fmt: skip


def student(folder, task, name, *more, steps=4, **options):
    return run(folder, task, *taught(folder, name, **options), *more, steps=steps)


def taught(folder, name, cache=True):
    return [
        f"--model.distillation.teacher={folder / 'teacher.ckpt'}", "--model.distillation.hidden=1",
        f"--model.distillation.cache={str(cache).lower()}", "--model.encoder.num_layers=1",
        f"--trainer.default_root_dir={folder / name}", f"--data.tokenizer={folder / 'teacher.ckpt'}",
    ]  # fmt: skip


def teach(folder, task, *more):
    teacher = run(folder, task, *more, steps=2)
    shutil.copy(teacher.runs.find("last").path, folder / "teacher.ckpt")


@pytest.mark.parametrize("task", CONFIGS)
def test_a_run_has_the_same_losses_and_goes_on_with_the_same_outputs(tmp_path, task, capsys):
    teach(tmp_path, task)
    more = ["--config=configs/memory/accumulation.yaml", "--trainer.callbacks.micro_batch=2"]
    losses = scalars(student(tmp_path, task, "without", *more, cache=False))["train/loss"]
    assert "its outputs" not in capsys.readouterr().err
    student(tmp_path, task, "kept", *more, steps=2)
    said = capsys.readouterr().err
    assert said.count("its outputs take") == 1
    assert "teacher     modern, 2 x 32" in said
    resumed = student(tmp_path, task, "kept", *more, "--ckpt_path=last")
    assert "its outputs" not in capsys.readouterr().err
    assert scalars(resumed)["train/loss"] == losses
    assert len([*(tmp_path / "cache/teachers").glob("*/hidden.bin")]) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    teach(folder, "classification")
    return folder


def test_what_decides_the_outputs_has_a_cache_of_its_own(folder, capsys):
    def made(*more):
        student(folder, "classification", "others", *more, steps=1)
        return "its outputs take" in capsys.readouterr().err

    found = [made(*more) for more in (
        [], ["--model.seed=4", "--model.distillation.temperature=3", "--data.batch_size=6"], ["--data.seed=4"],
        ["--model.distillation.hidden=0"], ["--model.distillation.logits=0"],
        ["--model.distillation.dtype=bfloat16"], ["--trainer.precision=bf16-mixed"],
        ["--data.max_length=24"], [],
    )]  # fmt: skip
    assert found == [True, False, True, True, True, True, True, True, False]
    (folder / "teacher.ckpt").rename(folder / "first.ckpt")
    try:
        teach(folder, "classification", "--model.seed=7")
        assert made()
    finally:
        (folder / "first.ckpt").rename(folder / "teacher.ckpt")


def test_data_that_draw_anew_in_each_epoch_are_refused(folder, monkeypatch, tmp_path):
    message = r"^model\.distillation\.cache: what rows hold is drawn anew in each epoch, as masks are"
    (tmp_path / "train.txt").write_text("".join(f"{i} words of {i}\n\n" for i in range(400)))
    with pytest.raises(UserError, match=message):
        fit(tmp_path, "--model.distillation.teacher=init_from", "--model.distillation.cache=true")

    def drawn(data, part, training):
        make = own(data, part, training)

        def with_noise(rows, key):
            batch = make(rows, key)
            batch.inputs.input_ids[:, 1] += torch.from_numpy(key.astype(np.int64)) % 3
            return batch

        return with_noise if training else make

    own = ClassificationData.batches_of
    monkeypatch.setattr(ClassificationData, "batches_of", drawn)
    with pytest.raises(UserError, match=message):
        student(folder, "classification", "drawn", "--model.distillation.logits=0.4")


def test_shards_are_refused_and_masks_that_are_drawn(folder):
    settings = settings_of(student(folder, "classification", "whole", steps=1))
    with pytest.raises(UserError, match=r"^model\.distillation\.cache: the teacher is in shards"):
        predict(replace(settings, devices=2, strategy="fsdp2"))
    task = MaskedLM(encoder=settings.task.encoder_config, distillation=settings.task.distillation_config)
    with pytest.raises(UserError, match=r"^model\.distillation\.cache: what rows hold is drawn anew in each epoch"):
        predict(replace(settings, task=task, data=MaskedLMData(max_length=16)))


def test_what_is_not_read_is_zero_so_that_steps_can_be_timed(folder, monkeypatch):
    """And the teacher before them, by the row."""
    settings = settings_of(student(folder, "classification", "timed", steps=1))
    clock = iter(range(10**6))
    times = measure(settings, clock=lambda: next(clock))  # a second between two looks at it
    assert (times.teacher_row, times.validation_batch) == (1 / settings.micro_batch, 1)
    settings.task.distillation_config.cache = False
    assert measure(settings, clock=lambda: next(clock)).teacher_row == 0


def test_what_a_task_makes_of_rows_counts(folder, monkeypatch, capsys):
    student(folder, "classification", "own", steps=1)
    capsys.readouterr()
    own = TextClassification.model_inputs
    with monkeypatch.context() as patch:
        patch.setattr(
            TextClassification, "model_inputs", lambda task, batch: (own(task, batch)[0], own(task, batch)[1] * 0)
        )
        student(folder, "classification", "other", steps=1)
    assert "runs over" in capsys.readouterr().err


def test_the_plan_counts_what_is_there(folder, monkeypatch):
    """Where the teacher's outputs are kept: its head, and what a micro-batch reads; before, the whole teacher."""
    runs = []

    def traced(distillation, given):
        with LiveBytes(distillation.task.model) as trace:
            found = own(distillation, given)
        runs.append(trace.timeline().by_category["activations"])
        return found

    def peaks(cache):
        gc.collect()
        with monkeypatch.context() as patch:
            patch.setattr(Distillation, "outputs", traced if cache else own)
            done = student(folder, "classification", "planned", "--data.val_batch_size=3", cache=cache, steps=3)
        monitor = next(callback for callback in done.trainer.callbacks if type(callback).__name__ == "MemoryMonitor")
        return predict(settings_of(done)).phases, monitor.peaks

    own = Distillation.outputs
    shutil.rmtree(folder / "cache/teachers", ignore_errors=True)
    peaks(True)  # leaves the same behind as those that follow
    (planned, measured), (kept, measured_kept) = peaks(False), peaks(True)
    teacher = leanbert.load(folder / "teacher.ckpt").model
    blocks = sum(weight.nbytes for weight in teacher.encoder.parameters())
    for phase in ("forward", "backward", "optimizer", "validation"):
        assert kept[phase]["other"] == planned[phase]["other"] - blocks, phase
        assert measured_kept[phase]["other"] == measured[phase]["other"] - blocks, phase
        found = {**measured_kept[phase], "other": kept[phase]["other"]}  # tests before have left some
        assert kept[phase] == pytest.approx(found, abs=4), phase  # a loss
    assert kept["teacher"]["other"] == planned["forward"]["other"]
    assert kept["teacher"]["optimizer"] == 0
    assert len(runs) == 7  # of 27 rows, four at a time
    assert kept["teacher"]["activations"] == max(runs)


def settings_of(done):
    config = DistillationConfig(**vars(done.model.distillation_config))
    task = TextClassification(
        encoder=done.model.encoder_config, optimizer=done.model.optimizer_config, distillation=config
    )
    data = ClassificationData(**done.datamodule.hparams)
    data.prepare()
    return RunSettings(task, data, (), "32-true", vocab_size=data.planned_vocabulary())


@pytest.mark.slow
def test_two_ranks_share_what_one_of_them_writes(folder):
    more = ["--model.encoder.dropout=0", "--model.encoder.attention_dropout=0"]
    alone = scalars(student(folder, "classification", "alone", *more, cache=False))["train/loss"]
    shutil.rmtree(folder / "cache/teachers", ignore_errors=True)
    command = [sys.executable, PROGRAM, *arguments(folder, "classification", *taught(folder, "ranks"), *more, steps=4)]
    ((code, words),) = started(ROOT, [*command, "--trainer.devices=2"])
    assert code == 0, words
    assert len([*(folder / "cache/teachers").glob("*/meta.json")]) == 1
    losses = read_scalars(next((folder / "ranks").glob("classification/version_*")))["train/loss"]
    assert losses == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow
def test_compress_trains_with_kept_outputs(tmp_path):
    """What is compressed is the teacher; as for `fit` its outputs are kept where the settings say so."""
    teach(tmp_path, "classification")
    ((code, words),) = started(ROOT, [
        sys.executable, PROGRAM, "compress", *arguments(tmp_path, "classification", steps=4)[1:], "--seconds=0.1",
        "--trainer.callbacks=[]", f"--ckpt_path={tmp_path / 'teacher.ckpt'}", f"--output={tmp_path / 'out'}",
        "--model.distillation.cache=true", '--steps=["pruning=0.5", "train=4"]',
    ])  # fmt: skip
    assert code == 0, words
    assert words.count("its outputs take") == 1
    assert len([*(tmp_path / "cache/teachers").glob("*/hidden.bin")]) == 1
    assert len(read_scalars(next((tmp_path / "out/training").glob("*/classification/version_*")))["train/loss"]) == 4
