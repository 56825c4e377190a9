"""Small data of every task, and the commands that train tiny models on them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .forks import ROOT

WORDS = (
    *("the", "a", "fine", "old", "green"),
    *("boat", "river", "lamp"),
    *("cook", "guest", "market", "sold", "found", "saw", "and", "near"),
)
THINGS = WORDS[5:8]
STEPS = 8
RECORDS = 60
TINY = [
    "--model.encoder.num_layers=2", "--model.encoder.hidden_size=32", "--model.encoder.num_heads=2",
    "--data.max_length=16", "--data.batch_size=16", "--data.vocab_size=300", "--data.cache_dir=cache",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=2",
]  # fmt: skip
TRAINING = [
    f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=3", "--trainer.log_every_n_steps=1",
    "--checkpoint.every_n_steps=2",
]  # fmt: skip
PLAIN = """\
trainer: {precision: 32-true, callbacks: []}
model: {init_args: {optimizer: {name: adamw, lr: 0.003}, schedule: {name: constant}}}
"""
TAGGING = """\
model:
  class_path: leanbert.tasks.tagging.TokenClassification
  init_args: {encoder: {preset: modern}}
data: {class_path: leanbert.data.token_labels.TokenLabelData}
trainer: {check_val_every_n_epoch: null}
checkpoint: {monitor: val/f1, mode: max}
"""


@dataclass(frozen=True)
class Task:
    """How a task is configured, the folder of its runs, and a line that `predict` answers."""

    config: str
    arguments: tuple[str, ...]
    runs: str
    line: str

    def configs(self) -> list[str]:
        """Return the options that name the configuration of the task and the plain settings of all."""
        return ["--config", self.config, "--config", "plain.yaml"]


def _shipped(name: str) -> str:
    return str(ROOT / "configs" / f"{name}.yaml")


TASKS = {
    "mlm": Task(_shipped("mlm"), ("--data.train_files=train.txt",), "mlm", "the [MASK] boat"),
    "classification": Task(
        _shipped("classification"), ("--data.train_files=train.csv",), "classification", "a fine boat"
    ),
    "tagging": Task("tagging.yaml", ("--data.train_files=train.conll",), "tagging", "the cook sold a boat"),
    "srl": Task(_shipped("srl"), ("--data.train_files=roles.jsonl",), "srl", "the cook sold a boat"),
    "translation": Task(
        _shipped("translation"),
        ("--data.train_files=source.en", "--data.train_target_files=target.xx", "--model.validation_sources=4"),
        "seq2seq", "a fine boat",
    ),
    "summarization": Task(
        _shipped("summarization"),
        ("--data.train_files=pairs.jsonl", "--data.max_target_length=16", "--model.validation_sources=4"),
        "seq2seq", "a fine boat near the river",
    ),
}  # fmt: skip


def command_of(task: str, subcommand: str, *more: str, overlays: Sequence[str] = ()) -> list[str]:
    """Return the arguments of a subcommand on the samples of a task, whose folder is the current one."""
    chosen = TASKS[task]
    memory = [word for name in overlays for word in ("--config", _shipped(f"memory/{name}"))]
    return [subcommand, *chosen.configs(), *memory, *TINY, *chosen.arguments, *more]


def write_samples(folder: Path, seed: int = 0) -> Path:
    """Write the data and configurations of all tasks into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    sentences = [" ".join(chance.choices(WORDS, k=chance.randint(3, 9))) for _ in range(RECORDS)]
    pairs = [(text, text[::-1]) for text in sentences]
    (folder / "plain.yaml").write_text(PLAIN)
    (folder / "tagging.yaml").write_text(TAGGING)
    (folder / "train.txt").write_text("\n\n".join(sentences) + "\n")
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, text.split()[0]) for text in sentences)])
    (folder / "train.conll").write_text("\n\n".join("\n".join(_tagged(text)) for text in sentences) + "\n")
    (folder / "source.en").write_text("".join(f"{source}\n" for source, _ in pairs))
    (folder / "target.xx").write_text("".join(f"{target}\n" for _, target in pairs))
    write_json_lines(folder / "pairs.jsonl", [{"source": text, "target": text.split()[0]} for text in sentences])
    write_json_lines(folder / "roles.jsonl", [_roles(text.split()) for text in sentences])
    for name, task in TASKS.items():
        (folder / f"{name}.lines").write_text(f"{task.line}\n" * 3)
    return folder


def write_json_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _tagged(text: str) -> list[str]:
    return [f"{word}\t{'B-THING' if word in THINGS else 'O'}" for word in text.split()]


def _roles(words: list[str]) -> dict[str, Any]:
    place = len(words) // 2
    labels = ["B-ARG0", *["I-ARG0"] * (place - 1), "B-V", *["O"] * (len(words) - place - 1)]
    return {"tokens": words, "predicate": place, "labels": labels}
