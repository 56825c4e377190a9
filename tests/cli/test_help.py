"""`--help`, and subcommands that do not exist."""

import subprocess
import sys

import pytest

from leanbert.class_paths import MODULES
from leanbert.cli.help import SUBCOMMANDS, text
from leanbert.cli.options import OPTIONS
from tests import launcher
from tests.cli.program import environment, run

LIBRARIES = """
import sys
from leanbert.cli import main
try:
    main()
finally:
    print([name for name in ("torch", "lightning", "jsonargparse", "numpy") if name in sys.modules])
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), (["fti"], 2), ([], 2)])
def test_help_and_mistakes_name_all_subcommands_without_the_libraries(tmp_path, arguments, code):
    words = [sys.executable, "-c", LIBRARIES, *arguments]
    result = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == code
    assert all(name in result.stdout + result.stderr for name in OPTIONS)
    assert result.stdout.endswith("[]\n")
    if code:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_the_help_has_a_line_for_each_subcommand_and_names_all_classes():
    assert SUBCOMMANDS.keys() == OPTIONS.keys()
    shown = text()
    for name, does in SUBCOMMANDS.items():
        assert f"  {name:<10}{does}\n" in shown
    for name in MODULES:
        assert name in shown


def test_help_of_a_subcommand_explains_settings_and_options(tmp_path, launcher_socket):
    words = [sys.executable, launcher.__file__, "fit", "--help"]
    result = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())
    for option, does in {
        "--trainer.max_bad_steps": "Steps in a row whose loss or gradient is not finite",
        "--checkpoint.every_n_steps": "Optimizer steps between two checkpoints",
        "--ckpt_path": "Checkpoint to go on from: a file",
        "--weights_only": "Not used: checkpoints never execute code",
        "--budget": "Memory that the run may need, such as 8GiB",
    }.items():
        assert option in shown
        assert does in shown


def test_help_of_a_plan_explains_what_it_takes_over(tmp_path, launcher_socket):
    words = [sys.executable, launcher.__file__, "plan", "--help"]
    result = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    shown = " ".join(result.stdout.split())
    for does in ("Whose architecture counts: a checkpoint", "Image file to draw the sweep into", "Machines that share"):
        assert does in shown


@pytest.mark.parametrize(
    ("option", "name", "setting"),
    [("model", "TextClassification", "class_weights"), ("trainer.callbacks", "MemoryMonitor", "cuda_snapshot")],
)
def test_help_of_a_class_takes_its_short_name(tmp_path, launcher_socket, option, name, setting):
    result = run(tmp_path, "fit", f"--{option}.help", name)
    assert f"--{option}.{setting}" in result.stdout
