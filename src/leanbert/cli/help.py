"""What `--help` says, and which subcommands there are: known without the seconds that the libraries take."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from leanbert.class_paths import MODULES
from leanbert.errors import UserError

SUBCOMMANDS = {
    "fit": "Train.",
    "validate": "Print the metrics on the validation set, as one JSON line.",
    "test": "Print the metrics on the test set, as one JSON line.",
    "predict": "Answer what is in a file or comes from standard input, a JSON line each.",
    "prepare": "Build tokenizer and token cache only; needs no accelerator, so it suits a login node.",
    "plan": "Say what memory a run needs, before anything is allocated, and which techniques fit it into a budget.",
    "export": "Write a trained model in a standard format.",
    "compress": "Make smaller variants of a trained model, and report what each has saved and cost.",
}
"""What each subcommand does, in the order of the help."""

TEXT = """\
usage: {program} SUBCOMMAND --config FILE [--config FILE ...] [--SETTING VALUE ...]

LeanBERT trains BERT encoders inside a device-memory budget.

subcommands:
{subcommands}

A file of settings overrides those before it, and a setting of the command line overrides all files:
  {program} fit --config configs/mlm.yaml --config configs/size/base.yaml --data.train_files text.txt

  {program} SUBCOMMAND --help                        its options, and the settings of trainer and checkpoints
  {program} SUBCOMMAND --config FILE --print_config  all settings as YAML, after files and command line
  {program} fit --model.help NAME                    settings of a task:
{tasks}
  {program} fit --data.help NAME                     settings of its data:
{data}
  {program} fit --trainer.callbacks.help NAME        settings of a callback:
{callbacks}
  {program} fit --trainer.strategy.help NAME         settings of a strategy for several devices:
{distributed}
"""


def answer(arguments: list[str]) -> bool:
    """Print the help if `arguments` ask for it, and return whether they did.

    Raises:
        UserError: No subcommand is given, or one that does not exist. Options before the subcommand are not looked at.
    """
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(text(), end="")
        return True
    if not first.startswith("-") and first not in SUBCOMMANDS:
        given = f"{first!r} is no subcommand" if first else "no subcommand is given"
        raise UserError(f"{given}. Choose from {', '.join(SUBCOMMANDS)}; --help says what each of them does.")
    return False


def text() -> str:
    """Return the help of the whole program."""
    classes = {
        package: textwrap.fill(
            ", ".join(name for name, module in MODULES.items() if module.startswith(f"{package}.")),
            initial_indent=" " * 6, subsequent_indent=" " * 6, width=100,
        )
        for package in ("tasks", "data", "callbacks", "distributed")
    }  # fmt: skip
    lines = [f"  {name:<10}{does}" for name, does in SUBCOMMANDS.items()]
    return TEXT.format(program=program_name(), subcommands="\n".join(lines), **classes)


def program_name() -> str:
    """Return how the user calls this program."""
    return "leanbert" if Path(sys.argv[0]).name.startswith("leanbert") else f"python {sys.argv[0]}"
