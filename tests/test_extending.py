"""The page on extending, followed word for word: its files are written, its commands run on a tiny model."""

from __future__ import annotations

import csv
import gc
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.data.formats import corpora
from leanbert.errors import UserError
from leanbert.planning.predict import predict
from tests.corpus import write_corpus
from tests.training import TINY

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
STEPS = 2
"""Of each `fit`; one that goes on takes as many more."""


class Planned(CLI):
    """The command line, which keeps what a plan predicts."""

    def plan(self, options):
        self.prediction = predict(self.run_settings())


class Section:
    """A section of the page, with its files in `folder`, which is the current one.

    `more` are settings that make its commands small.
    """

    def __init__(self, title, folder, *more):
        self.text = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
        self.more = [*more, f"--data.cache_dir={folder / 'cache'}", "--trainer.enable_progress_bar=false"]
        self.more += ["--trainer.accelerator=cpu"]
        self.steps = 0
        for language, ending in (("python", "py"), ("yaml", "yaml")):
            (folder / re.search(rf"`(\w+\.{ending})`", self.text)[1]).write_text(self.blocks(language)[0])

    def blocks(self, language):
        return re.findall(rf"```{language}\n(.*?)```", self.text, re.DOTALL)

    @property
    def commands(self):
        return [line for block in self.blocks("bash") for line in block.splitlines()]

    def run(self, line, *more):
        """Run a command of the page in this process."""
        gc.collect()  # what the command before has left would count as live
        arguments = shlex.split(line)
        arguments = arguments[arguments.index("train.py") + 1 :]
        if arguments[0] == "predict":
            return CLI([*arguments, *self.more])
        self.steps += STEPS if arguments[0] == "fit" else 0
        return Planned([*arguments, *TINY, *self.more, f"--trainer.max_steps={self.steps or STEPS}", *more])


def summary(cli):
    return json.loads((Path(cli.trainer.log_dir) / "summary.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    quiet_libraries()
    write_corpus(tmp_path / "train.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in ("frozen", "detection", "fasta"):
        sys.modules.pop(module, None)


def test_a_technique(folder):
    section = Section(
        "A memory technique", folder, f"--data.train_files={folder / 'train.txt'}", "--model.encoder.preset=bert"
    )
    plan, fit = section.commands
    frozen, plain = (section.run(line).prediction for line in (plan, plan.replace("--config frozen.yaml", "")))
    model = section.run(fit).model.model
    embeddings = model.encoder.embeddings
    weights = (embeddings.token.weight, embeddings.position.weight)
    assert not any(weight.requires_grad for weight in weights)
    assert all(weight.requires_grad for weight in model.encoder.blocks.parameters())
    assert plain.gradient_bytes - frozen.gradient_bytes == pytest.approx(sum(w.nbytes for w in weights), rel=0.2)
    with pytest.raises(UserError, match="FrozenEmbeddings: a pruned model has to learn again"):
        section.run(f"{fit} --config configs/memory/structured_pruning.yaml")


@pytest.mark.slow
def test_a_task(folder, monkeypatch, capsys):
    texts = f"--data.train_files={folder / 'train.txt'}"
    section = Section("A task", folder)
    plan, fit, more, validate, ask, tune = section.commands
    predicted = section.run(plan, texts, "--prepare=true").prediction.by_category
    trained = summary(section.run(fit, texts))["by_category"]  # tests before this one may have left others
    for name in ("parameters", "gradients", "optimizer", "activations"):
        assert trained[name] == pytest.approx(predicted[name], rel=0.02, abs=4096), name

    resumed = summary(section.run(more, texts))
    alone = summary(section.run(fit, texts, f"--trainer.max_steps={2 * STEPS}", "--trainer.default_root_dir=alone"))
    assert resumed["steps"] == alone["steps"] == 2 * STEPS
    for tag in ("val/loss", "val/f1"):  # as if it had not been stopped, and as with other micro-batches
        assert resumed["metrics"][tag] == alone["metrics"][tag]
    plain = fit.replace(" --config configs/memory/layer_major.yaml", "")
    in_one = summary(section.run(plain, texts, f"--trainer.max_steps={2 * STEPS}", "--trainer.default_root_dir=plain"))
    assert in_one["metrics"]["val/loss"] == pytest.approx(alone["metrics"]["val/loss"], rel=1e-5)

    capsys.readouterr()
    section.run(validate, texts)
    assert json.loads(capsys.readouterr().out).keys() >= {"val/loss", "val/f1"}
    text = shlex.split(ask)[1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text}\n".encode())))
    section.run(ask)
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == text
    assert isinstance(answer["replaced"], list)

    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((f"The cat {n} sat.", "ab"[n % 2]) for n in range(40))])
    tuned = section.run(tune, "--data.train_files=labels.csv", "--data.val_share=0.3")
    assert tuned.model.model.task == "classification"


def test_the_task_learns(folder):
    section = Section("A task", folder)
    fit = section.commands[1]
    texts = f"--data.train_files={folder / 'train.txt'}"
    assert summary(section.run(fit, texts, "--trainer.max_steps=20"))["metrics"]["val/f1"] > 0.4


def test_a_data_format(folder, monkeypatch):
    monkeypatch.setattr(corpora, "READERS", corpora.READERS.copy())
    (folder / "proteins").mkdir()
    sequences = [["MKVLAAGGSPEPTIDEWLY"[n % 7 :] * 3, "GGSIDE"] for n in range(60)]
    lines = [line for n, parts in enumerate(sequences) for line in (f">protein {n}", *parts)]
    file = folder / "proteins" / "some.fasta"
    file.write_text("\n".join(lines) + "\n")
    section = Section("A data format", folder)
    (fit,) = section.commands
    data = section.run(fit, "--data.val_share=0.1").datamodule
    read = {piece.text for part in ("train", "val") for piece in data.corpus(part).pieces()}
    assert read == {"".join(parts) for parts in sequences}
    file.write_text("GGSIDE\n" + file.read_text())
    with pytest.raises(UserError, match=r"some\.fasta:1: letters before the first name"):
        section.run(fit)
