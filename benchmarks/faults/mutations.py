"""Damaged and hostile inputs: each is read whole, or refused with one line; nothing is executed, nothing hangs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from . import mutators, references
from .forks import Outcome, Process, command, fresh
from .records import data_module, expected_records, records_read, write_format
from .samples import TASKS, command_of, write_samples
from .trained import base_of, done_well

MOST_CPU_SECONDS = 20.0
MOST_SECONDS = 90.0
"""A process that has to wait for others' cores gets more time than one that hangs."""
MOST_BYTES = 2 << 30
ADDRESS_SPACE = 3 << 30
"""More than this cannot be allocated above what the forked process has: the machine is to survive."""
COUNTED = re.compile(r"\d[\d,]* (rows?|records?|lines?|texts?|documents?|sentences?|pairs?|examples?|cells?)", re.I)
ENDLESS = ("max_steps", "max_epochs", "min_steps", "min_epochs", "limit_val_batches", "max_new", "num_nodes")
"""Settings whose large values take long, or wait for machines that do not come."""

FORMATS = {
    "mlm": ("txt", "jsonl", "csv", "tsv", "parquet", "txt.gz", "csv.gz"),
    "classification": ("jsonl", "csv", "tsv", "csv.gz", "jsonl.gz"),
    "tagging": ("conll", "jsonl", "conll.gz"),
    "srl": ("jsonl", "jsonl.gz"),
    "translation": ("lines", "jsonl", "tsv"),
    "summarization": ("jsonl", "csv"),
}
OTHERS = {
    "setting": 8, "yaml": 5, "checkpoint": 6, "checkpoint last": 2, "model folder": 6, "tokenizer": 6, "cache": 5,
    "predict": 4,
}  # fmt: skip
"""Kinds and how many of each there are to every two of each format of data."""


def experiments(count: int, seed: int) -> list[dict[str, Any]]:
    """Return what is done: kinds in turn, with what decides the damage."""
    data = [f"data {task} {form}" for task, forms in FORMATS.items() for form in forms]
    kinds = [*data, *data, *(kind for kind, share in OTHERS.items() for _ in range(share))]
    chance = random.Random(seed)
    chance.shuffle(kinds)
    return [{"kind": kinds[number % len(kinds)], "chance": chance.randrange(2**32)} for number in range(count)]


def run(experiment: dict[str, Any], work: Path) -> dict[str, Any]:
    """Damage an input, use it, and return what was wrong, if anything."""
    kind, *about = experiment["kind"].split(" ", 1)
    chance = random.Random(experiment["chance"])
    folder = fresh(work / f"mutation-{experiment['number']}")
    wrong, what = KINDS[kind](Case(folder, work, chance), *about)
    if wrong is None:
        shutil.rmtree(folder, ignore_errors=True)
    return {"wrong": wrong, "what": what}


@dataclass(frozen=True)
class Case:
    """The folder of an experiment, that of all, and what decides the damage."""

    folder: Path
    work: Path
    chance: random.Random

    def call(self, function: Callable[[], object], stdin: bytes = b"") -> Outcome:
        """Return how the function ended in a limited process."""

        def limited() -> None:
            used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
            resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + ADDRESS_SPACE,) * 2)
            function()

        return Process(limited, self.folder, stdin).wait(MOST_SECONDS)

    def judge(self, done: Outcome) -> str | None:
        """Return what is against the rules for any input."""
        if (self.folder / mutators.CANARY).exists():
            return "code was executed"
        if done.cpu_seconds > MOST_CPU_SECONDS or done.seconds > MOST_SECONDS:
            return f"hangs: {done.cpu_seconds:.0f} s of CPU"
        if done.rss_bytes > MOST_BYTES:
            return f"needs {done.rss_bytes / 2**30:.1f} GiB"
        if done.code == 1 and "Traceback" not in done.stderr and re.search("finite|NaN", done.stderr):
            return None  # training has stopped with its reason
        return done.problem


def guarded(function: Callable[[], object]) -> Callable[[], None]:
    """Return the function with its errors for users as the command line shows them."""

    def run() -> None:
        from leanbert.errors import UserError

        try:
            function()
        except UserError as error:
            raise SystemExit(_refuse(error)) from None

    return run


def _refuse(error: Exception) -> int:
    import sys

    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    return 2


# ---- data


def damaged_data(case: Case, about: str) -> tuple[str | None, str]:
    """Read a damaged file of a task through the data module, and compare what it has read."""
    task, form = about.split()
    base = base_of("mlm", case.work)
    write_samples(case.folder)
    path = case.folder / f"damaged.{form}"
    write_format(path, task)
    shutil.copy(path, good := case.folder / f"good.{form.removesuffix('.gz')}")
    chance, data = case.chance, path.read_bytes()
    if form == "parquet":
        data = mutators.damage(data, chance)
    else:
        data = _changed(data, form, chance)
        data = mutators.compress(data, chance) if form.endswith(".gz") else data
    path.write_bytes(data)
    settings: dict[str, Any] = {"train_files": [path.name], "val_files": [good.name], "tokenizer": str(base.tokenizer)}
    if form == "lines":
        settings |= {"train_target_files": ["target.xx"], "val_target_files": ["target.xx"]}

    def use() -> None:
        module = data_module(task, **settings)
        module.prepare()
        Path("records.json").write_text(json.dumps(list(records_read(task, module, path.name))))

    done = case.call(guarded(use))
    return case.judge(done) or (compared(case, task, path, done) if done.code == 0 else None), f"{form} -> {done.code}"


def _changed(data: bytes, form: str, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return mutators.damage(data, chance)
    text = data.decode()
    if form.startswith("jsonl") and chance.random() < 0.5:
        lines = text.splitlines()
        place = chance.randrange(len(lines))
        lines[place] = json.dumps(mutators.change_value(json.loads(lines[place]), chance))
        return ("\n".join(lines) + "\n").encode()
    return mutators.encode(mutators.change_text(text, chance), chance)


def compared(case: Case, task: str, path: Path, done: Outcome) -> str | None:
    """Return in what the records that were read differ from those of an independent reader."""
    read = [tuple(record) for record in json.loads((case.folder / "records.json").read_text())]
    if COUNTED.search(done.stderr):
        return None  # it says how many are not read as they are
    readings, refused = [], ""
    for lone in ("\n", " "):  # a lone carriage return may end a line
        try:
            readings.append(expected_records(task, path, lone))
        except (references.UnreadableError, ValueError) as error:
            refused = str(error)[:100]
    if not readings:
        return f"read {len(read)} records of what is not certain ({refused})"
    for place, (one, other) in enumerate(zip_longest(read, readings[0])):
        if one != other and read not in readings:
            return (
                f"{len(read)} records for {len(readings[0])}; number {place}: {str(one)[:150]} for {str(other)[:150]}"
            )
    return None


# ---- settings and configurations


def copied(case: Case, *tasks: str) -> str:
    """Copy the trained model of one of the tasks to the case's folder, and return the task."""
    task = case.chance.choice(tasks)
    shutil.copytree(base_of(task, case.work).folder, case.folder)
    return task


@cache
def numeric_settings(task: str, folder: Path) -> list[str]:
    """Return the settings of `fit` that are numbers, or unset."""
    done = done_well(folder, command_of(task, "fit", "--print_config"))
    found = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            found.append(name)

    walk(yaml.safe_load(done.stdout), "")
    return found


def odd_setting(case: Case) -> tuple[str | None, str]:
    """Train with an odd value of a numeric setting."""
    task = copied(case, *TASKS)
    name = case.chance.choice(numeric_settings(task, base_of(task, case.work).folder))
    values = [
        v for v in mutators.SETTING_VALUES if not (name.endswith(ENDLESS) and v not in ("0", "1", "2", "nan", "''"))
    ]
    value = case.chance.choice(values)
    done = case.call(command(command_of(task, "fit", "--trainer.max_steps=2", f"--{name}={value}")))
    return case.judge(done) or _strict_summaries(case.folder), f"{task} --{name}={value} -> {done.code}"


def _strict_summaries(folder: Path) -> str | None:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in summary.json")

    for path in folder.glob("runs/*/*/summary.json"):
        try:
            json.loads(path.read_text(), parse_constant=refuse)
        except ValueError as error:
            return str(error)
    return None


def odd_yaml(case: Case) -> tuple[str | None, str]:
    """Train with a damaged configuration."""
    task = copied(case, "mlm", "classification")
    text = mutators.change_yaml(Path(TASKS[task].config).read_text(), case.chance)
    (case.folder / "odd.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    more = ["--trainer.max_steps=2", "--trainer.callbacks=[]"]
    arguments = [word.replace(TASKS[task].config, "odd.yaml") for word in command_of(task, "fit", *more)]
    done = case.call(command(arguments))
    return case.judge(done), f"{task} -> {done.code}"


# ---- checkpoints, folders, tokenizers, caches


def damaged_checkpoint(case: Case, which: str = "") -> tuple[str | None, str]:
    """Load a damaged checkpoint by its name, or let `last` fall back."""
    task = copied(case, "mlm", "classification", "translation")
    path = next((case.folder / "runs").glob("*/version_0/checkpoints/step-00000004.ckpt"))
    before = torch.load(path, weights_only=True)["state_dict"]
    path.write_bytes(mutators.change_archive(path.read_bytes(), case.chance))
    if which == "last":
        done = case.call(command(command_of(task, "validate", "--ckpt_path=last")))
        wrong = case.judge(done)
        if wrong is None and done.stdout not in base_of(task, case.work).answers:
            wrong = f"neither the newest whole checkpoint nor the one before: {done.stderr[-200:]}"
        return wrong, f"{task} -> {done.code}"

    def use() -> None:
        import leanbert

        weights = leanbert.load(path).model.state_dict()
        same = all(
            torch.equal(before[f"model.{name}"], value) for name, value in weights.items() if f"model.{name}" in before
        )
        print(same)

    done = case.call(guarded(use))
    wrong = case.judge(done)
    return wrong or ("other weights, without a word" if done.stdout == "False\n" else None), f"{task} -> {done.code}"


def damaged_folder(case: Case) -> tuple[str | None, str]:
    """Use an export of which a file is damaged."""
    task = copied(case, "mlm", "classification", "tagging")
    name = mutators.change_folder(case.folder / "export", case.chance)

    def use() -> None:
        import leanbert

        model = leanbert.load("export")
        model.encode(["a fine boat"])

    if case.chance.random() < 0.2:
        done = case.call(command(command_of(task, "fit", "--trainer.max_steps=1", "--model.init_from=export")))
    else:
        done = case.call(guarded(use))
    return case.judge(done), f"{task} {name} -> {done.code}"


VOCABULARY = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz",
    "the",
    "boat",
    "##at",
    "lamp",
    "ü",
)
TEXTS = ("the boat", "a lamp at the boats", "Über [MASK] the", "the  boat\u200b lamp", "the-boat, lamp.", "東 the é")


def damaged_tokenizer(case: Case) -> tuple[str | None, str]:
    """Load a tokenizer of which a file is damaged; its ids are those of transformers, where both load it."""
    target = case.folder / "tok"
    if case.chance.random() < 0.5:
        shutil.copytree(base_of("mlm", case.work).folder / "export", target, ignore=lambda *_: ["model.safetensors"])
    else:
        target.mkdir(parents=True)
        (target / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        options = {"tokenizer_class": "BertTokenizer", "do_lower_case": case.chance.random() < 0.5}
        (target / "tokenizer_config.json").write_text(json.dumps(options))
    name = mutators.change_folder(target, case.chance)

    def ours() -> None:
        from leanbert.data.tokenizers.tokenizer import TextTokenizer

        print(json.dumps([list(ids) for ids in TextTokenizer.from_file("tok").encode_batch(list(TEXTS))]))

    def theirs() -> None:
        from transformers import AutoTokenizer

        print(json.dumps(AutoTokenizer.from_pretrained("tok")(list(TEXTS))["input_ids"]))

    one, other = case.call(guarded(ours)), case.call(theirs)
    if one.code == other.code == 0 and one.stdout != other.stdout:
        return case.judge(one) or f"other ids than transformers: {one.stdout[:100]} for {other.stdout[:100]}", name
    return case.judge(one), f"{name} -> {one.code}"


def damaged_cache(case: Case) -> tuple[str | None, str]:
    """Prepare from a damaged cache: it is rebuilt, or was not needed."""
    task = copied(case, *TASKS)
    cache_folder = case.folder / "cache"
    files = sorted(path for path in cache_folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    path, data = case.chance.choice(files), b""
    data = path.read_bytes()
    action = case.chance.randrange(8)
    if action == 0:
        path.unlink()
    elif action == 1:
        path.write_bytes(case.chance.choice(files).read_bytes())
    else:
        change = mutators.change_json if path.suffix == ".json" else mutators.damage
        path.write_bytes(change(data, case.chance))
    settings = dict(word.removeprefix("--data.").split("=", 1) for word in TASKS[task].arguments if "--data." in word)

    def use() -> None:
        print(digest_of_batches(data_module(task, **{k: int(v) if v.isdigit() else v for k, v in settings.items()})))

    done = case.call(guarded(use))
    wrong = case.judge(done) or (f"refused: {done.stderr[-300:]}" if done.code else None)
    shutil.rmtree(cache_folder)
    right = case.call(guarded(use)).stdout
    return wrong or (None if done.stdout == right else "other data"), f"{task} {path.name} -> {done.code}"


def digest_of_batches(module: Any) -> str:
    """Return a digest of all batches of training and validation."""
    module.setup("fit")
    digest = hashlib.blake2b()
    for rows in (module.training_rows(), module.evaluation_rows("val")):
        batch = rows[np.arange(rows.rows)]
        values = [getattr(batch, field.name) for field in fields(batch)] if is_dataclass(batch) else list(batch)
        for value in values:
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


# ---- lines to answer


def odd_lines(case: Case) -> tuple[str | None, str]:
    """Answer odd lines: one JSON object each, in their order."""
    task, chance = copied(case, *TASKS), case.chance
    odd = [text for text in mutators.ODD_TEXTS if len(text) < 1000]
    lines = [
        chance.choice((TASKS[task].line, mutators.change_text(TASKS[task].line, chance), chance.choice(odd)))
        for _ in range(chance.randint(1, 12))
    ]
    text = "\n".join(line for line in lines if len(line) < 2000)
    stdin = mutators.encode(text, chance)
    done = case.call(command(command_of(task, "predict", "--ckpt_path=last", "--data.predict_files=-")), stdin)
    wrong = case.judge(done)
    if wrong is None and done.code == 0:
        wrong = answers_of(task, stdin.decode("utf-8", "replace"), done.stdout)
    return wrong, f"{task} -> {done.code}"


def answers_of(task: str, asked: str, answered: str) -> str | None:
    """Return in what the answers are not those to the lines."""
    try:
        answers = [json.loads(line) for line in answered.split("\n") if line]
    except ValueError as error:
        return f"no JSON: {error}"
    if task in ("srl", "classification"):
        return None  # an answer for each predicate; a tab stands between two texts
    field = {"mlm": "text", "tagging": "tokens"}.get(task, "source")
    given = [text for (text,) in references.plain((answer[field],) for answer in answers)]
    asked = asked.removeprefix("\ufeff")
    for text in (asked.replace("\r\n", "\n").replace("\r", "\n"), asked):  # a lone carriage return may end a line
        lines = text.removesuffix("\n").split("\n") if text else []
        expected = [line for (line,) in references.plain((line,) for line in lines)]
        if given == [line for line in expected if line or task != "tagging"]:
            return None
    return f"answers {str(given)[:200]} for {str(expected)[:200]}"


KINDS: dict[str, Callable[..., tuple[str | None, str]]] = {
    "data": damaged_data,
    "setting": odd_setting,
    "yaml": odd_yaml,
    "checkpoint": damaged_checkpoint,
    "model": lambda case, _: damaged_folder(case),
    "tokenizer": damaged_tokenizer,
    "cache": damaged_cache,
    "predict": odd_lines,
}
