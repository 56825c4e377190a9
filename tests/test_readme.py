"""Every command and every snippet of README.md and docs/ runs, in order, in one folder, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.corpus import write_corpus
from tests.test_cli import ROOT, environment
from tests.training import TINY

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN_HERE = ("pip install -e", "tensorboard --logdir")  # the installation is what runs these tests
STEPS_A_COMMAND = 2


def blocks(language):
    for document in DOCUMENTS:
        for block in re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            yield document.name, block


def commands():
    for name, block in blocks("bash"):
        for line in block.strip().splitlines():
            if not line.startswith(NOT_RUN_HERE):
                yield name, line


def shortened(line, number):
    """Return the command for a tiny model and few steps; a later `fit` of the same run still has some to do."""
    line = line.replace("python train.py", f"{sys.executable} {ROOT / 'train.py'}")
    if re.search(r"train\.py (fit|validate|prepare|plan) ", line):
        limits = [*TINY, f"--trainer.max_steps={STEPS_A_COMMAND * (number + 1)}", "--trainer.limit_val_batches=2"]
        line = f"{line} {' '.join(limits)}"
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus" / "train.txt")
    write_corpus(folder / "corpus" / "val.txt", documents=40)
    (folder / "corpus" / "more.jsonl").write_text(json.dumps({"text": "The king sold the bread."}) + "\n")
    return folder


def test_the_first_command_is_the_installation_and_the_main_job():
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    first = re.search(r"```bash\n(.*?)\n```", readme, flags=re.DOTALL)[1]
    assert first == "pip install -e . && python train.py fit --config configs/mlm.yaml"


def test_commands_and_snippets_run_in_order(folder):
    main_job = f"{sys.executable} {ROOT / 'train.py'} fit --config configs/mlm.yaml"
    lines = [("README.md", main_job), *commands()]
    assert len(lines) > 8
    for number, (name, line) in enumerate(lines):
        result = subprocess.run(
            shortened(line, number), shell=True, cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, f"{name}: {line}\n{result.stderr[-2000:]}"
    for name, snippet in blocks("python"):
        result = subprocess.run(
            [sys.executable, "-c", snippet], cwd=folder, env=environment(), capture_output=True, text=True
        )
        assert result.returncode == 0, f"{name}: {snippet}\n{result.stderr[-2000:]}"
        assert result.stdout


def test_documents_name_files_that_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
        for config in re.findall(r"configs/[\w/]+\.yaml", text):
            assert (ROOT / config).is_file(), f"{document.name}: {config}"
