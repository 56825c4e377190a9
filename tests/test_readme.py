"""Every command and every snippet of README.md and docs/ runs, document by document in order, on a tiny model."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys

import pytest

import leanbert
from leanbert.api import Pretrained
from leanbert.cli.app import CLI, quiet_libraries
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
PROGRAM = ROOT / "train.py"


def blocks(document, language):
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


API = ROOT / "docs" / "api.md"


def commands(document):
    lines = [line for block in blocks(document, "bash") for line in block.strip().splitlines()]
    return [line for line in lines if not line.startswith(NOT_RUN_HERE)]


def shortened(line, number):
    """Return the command for a tiny model and few steps; a later `fit` of the same run still has some to do."""
    if re.search(r"train\.py (fit|validate|prepare|plan|compress) ", line):
        limits = [*TINY, f"--trainer.max_steps={STEPS_A_COMMAND * (number + 1)}", "--trainer.limit_val_batches=2"]
        line = f"{line} {' '.join(limits)}"
    if " compress " in line:
        line += " --trainer.limit_test_batches=2 --seconds=0.1"
    if line.startswith("torchrun "):  # starts processes of its own
        return line.replace("torchrun", f"{sys.executable} -m torch.distributed.run").replace(
            " train.py", f" {PROGRAM}"
        )
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
    [
        document
        for document in DOCUMENTS
        if document.name != FOLLOWED_ELSEWHERE and (commands(document) or blocks(document, "python"))
    ],
    ids=lambda document: document.name,
)
def test_commands_and_snippets_run_in_order(document, folder):
    lines, snippets = commands(document), blocks(document, "python")
    if "exports/mlm" in "".join([*lines, *snippets]):
        lines = [MAIN_JOB, *([] if any("export " in line for line in lines) else [EXPORT]), *lines]
    for number, line in enumerate(lines):
        run(shortened(line, number), folder, shell=True)
    assert all("print(" in snippet for snippet in snippets)
    if snippets:  # one after the other in one process, which imports the libraries once
        assert run([sys.executable, "-c", "\n".join(snippets)], folder)


def run(command, folder, shell=False):
    """Run a command that succeeds and return what it prints."""
    result = subprocess.run(
        command, shell=shell, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stderr[-2000:]}"
    return result.stdout


def test_the_page_on_python_has_the_signatures_of_the_code():
    page = API.read_text(encoding="utf-8")
    names = {"leanbert": leanbert, "Pretrained": Pretrained}
    for line in re.findall(r"^from leanbert.* import .*$", page, flags=re.MULTILINE):
        exec(line, names)
    rows = re.findall(r"^\| `([\w.]+)\((.*?)\)` \|", page, flags=re.MULTILINE)
    assert len(rows) > 15
    for name, shown in rows:
        real = signature(eval(name, names))
        if name != "CLI":  # Lightning's own, of which the page shows what counts
            assert real == shown or (shown.endswith(", ...") and real.startswith(shown[:-3])), f"{name}({real})"
    public = {name for name in vars(Pretrained) if not name.startswith("_")}
    assert {name.split(".")[1] for name, _ in rows if name.startswith("Pretrained.")} == public


def signature(function):
    """Return names and defaults of the parameters, without types."""
    is_method = inspect.isfunction(function) and "." in function.__qualname__
    parameters = list(inspect.signature(function).parameters.values())[is_method:]
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return str(inspect.Signature(plain))[1:-1]


def commands_above(config):
    return re.findall(r"^#   (python train\.py .*)$", config.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_commands_above_a_configuration_are_understood(config, capsys):
    quiet_libraries()
    for line in commands_above(config):
        with pytest.raises(SystemExit) as ended:
            CLI([*shlex.split(line)[2:], "--print_config"])
        assert ended.value.code == 0
        assert "class_path" in capsys.readouterr().out


def test_each_configuration_begins_with_the_command_that_uses_it():
    for config in sorted((ROOT / "configs").rglob("*.yaml")):
        assert any(f"--config {config.relative_to(ROOT)}" in line for line in commands_above(config)), config


def test_the_documents_hold_commands():
    assert sum(len(commands(document)) for document in DOCUMENTS) > 30
    assert EXPORT in commands(DOCUMENTS[0])


def test_documents_name_files_that_exist():
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
        for config in re.findall(r"configs/[\w/]+\.yaml", text):
            assert (ROOT / config).is_file(), f"{document.name}: {config}"
        for code in re.findall(r"`([\w./]+/\w+\.py)`", text):
            assert any((root / code).exists() for root in (ROOT, ROOT / "src" / "leanbert")), f"{document.name}: {code}"
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
            assert anchor in anchors(document.parent / file if file else document), f"{document.name}: {file}#{anchor}"


def anchors(document):
    """Return what a link may name in a document: its headings in lower case, without punctuation, with hyphens."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_benchmarks_begin_with_links_to_all_sections():
    document = ROOT / "docs" / "benchmarks.md"
    assert set(re.findall(r"\(#(.*?)\)", document.read_text(encoding="utf-8"))) == anchors(document) - {"benchmarks"}
