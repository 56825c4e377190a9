"""Tables of docs/benchmarks.md: one section per benchmark, each with the command and the hardware that made it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from leanbert.measure.counters import device_name

DOCUMENT = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def hardware() -> str:
    """Return processor, cores and versions in one line."""
    name = device_name(torch.device("cpu"))
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {torch.get_num_threads()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def without_folders(argument: str) -> str:
    """Return a command's argument with the folders of this machine cut from absolute paths."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def write_section(name: str, title: str, body: str, path: Path = DOCUMENT) -> None:
    """Replace the section `name` of the document at `path`, or append it; print it too."""
    command = " ".join(["python", *map(without_folders, sys.argv)])
    text = f"## {title}\n\n`{command}`, {hardware()}, {date.today()}.\n\n{body}\n"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    document = path.read_text(encoding="utf-8") if path.is_file() else "# Benchmarks\n"
    section = f"{begin}\n{text}{end}"
    if begin in document:
        head, rest = document.split(begin)
        document = head + section + rest.split(end)[1]
    else:
        document = document.rstrip("\n") + f"\n\n{section}\n"
    path.write_text(document, encoding="utf-8")
    print(text)
