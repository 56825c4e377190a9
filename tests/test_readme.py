"""Every command and every snippet of README.md and docs/ runs, document by document in order, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests import launcher
from tests.cli.program import ROOT, environment
from tests.corpus import write_corpus
from tests.training import TINY

FOLLOWED_ELSEWHERE = "extending.md"
"""By `test_extending.py`, which writes the files that it shows."""
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAIN_JOB = "python train.py fit --config configs/mlm.yaml"
EXPORT = "python train.py export --config configs/mlm.yaml --ckpt_path best --format hf --output exports/mlm"
NOT_RUN_HERE = ("pip install -e", "tensorboard --logdir")  # the installation is what runs these tests
STEPS_A_COMMAND = 2


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(document):
    lines = [line for block in blocks(document, "bash") for line in block.strip().splitlines()]
    return [line for line in lines if not line.startswith(NOT_RUN_HERE)]


def shortened(line, number):
    """Return the command for a tiny model and few steps; a later `fit` of the same run still has some to do."""
    if re.search(r"train\.py (fit|validate|prepare|plan) ", line):
        limits = [*TINY, f"--trainer.max_steps={STEPS_A_COMMAND * (number + 1)}", "--trainer.limit_val_batches=2"]
        line = f"{line} {' '.join(limits)}"
    return line.replace("python train.py", f"{sys.executable} {launcher.__file__}")


@pytest.fixture
def folder(tmp_path, launcher_socket):
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus" / "train.txt")
    write_corpus(tmp_path / "corpus" / "val.txt", documents=40)
    (tmp_path / "corpus" / "more.jsonl").write_text(json.dumps({"text": "The king sold the bread."}) + "\n")
    return tmp_path


def test_the_first_command_is_the_installation_and_the_main_job():
    assert blocks(DOCUMENTS[0], "bash")[0] == f"pip install -e . && {MAIN_JOB}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if commands(document) and document.name != FOLLOWED_ELSEWHERE],
    ids=lambda document: document.name,
)
def test_commands_and_snippets_run_in_order(document, folder):
    lines = commands(document)
    if any("exports/mlm" in line for line in lines):
        lines = [MAIN_JOB, *([] if any("export " in line for line in lines) else [EXPORT]), *lines]
    for number, line in enumerate(lines):
        result = subprocess.run(
            shortened(line, number), shell=True, cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, f"{line}\n{result.stderr[-2000:]}"
    for snippet in blocks(document, "python"):
        result = subprocess.run(
            [sys.executable, "-c", snippet], cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, f"{snippet}\n{result.stderr[-2000:]}"
        assert result.stdout


def test_the_documents_hold_commands():
    assert sum(len(commands(document)) for document in DOCUMENTS) > 30
    assert EXPORT in commands(DOCUMENTS[0])


def test_documents_name_files_that_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
        for config in re.findall(r"configs/[\w/]+\.yaml", text):
            assert (ROOT / config).is_file(), f"{document.name}: {config}"
