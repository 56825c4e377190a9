"""Text files of which one has the sources and another, line by line, their targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from leanbert.data.formats.corpora import Corpus, no_report
from leanbert.data.formats.documents import Skipped
from leanbert.data.formats.readers import open_binary, whole_lines
from leanbert.errors import UserError


def parallel_lines(sources: list[str], targets: list[str], part: str) -> Iterator[tuple[str, str, str]]:
    """Yield ("file:line", source, target) of text files, in the order in which they are given.

    Any name will do, such as train.en: they are lines of text. Pairs with a blank side are left out, and counted.

    Raises:
        UserError: There are more files, or lines, on one side. Names the setting or the line.

    """
    here, there = _in_order(sources, f"data.{part}_files"), _in_order(targets, f"data.{part}_target_files")
    if len(here) != len(there):
        raise UserError(f"data.{part}_target_files: {len(there)} files for {len(here)} of sources. Give one for each")
    skipped = Skipped()
    for source, target in zip(here, there, strict=True):
        for one, other in zip_longest(_lines(source), _lines(target)):
            if one is None or other is None:
                longer, place = (source, one) if other is None else (target, other)
                raise UserError(
                    f"{longer}:{place[0]}: the other file ({target if other is None else source}) has no such line. "
                    "Give files with a line for each pair"
                )
            if not skipped.lacks(f"{source}:{one[0]}", one[1], other[1]):
                yield f"{source}:{one[0]}", one[1], other[1]
    skipped.tell()


def _in_order(patterns: list[str], setting: str) -> list[Path]:
    return [path for pattern in patterns for path in Corpus((pattern,), setting=setting, suffixes=("",)).files]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open_binary(path, no_report) as stream:
        for number, line in whole_lines(stream, str(path)):
            yield number, line.rstrip("\n")
