"""Text files of which one has the sources and another, line by line, their targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from leanbert.data.formats.corpora import expanded
from leanbert.data.formats.documents import Skipped
from leanbert.data.formats.readers import lines_of
from leanbert.errors import UserError


def parallel_lines(sources: list[str], targets: list[str], part: str) -> Iterator[tuple[str, str, str]]:
    """Yield ("file:line", source, target) of text files, in the order in which they are given.

    Any name will do, such as train.en: they are lines of text. Pairs with a blank side are left out, and counted.
    Raises UserError: there are more files, or lines, on one side. Names the setting or the line.
    """
    here, there = expanded(sources, f"data.{part}_files"), expanded(targets, f"data.{part}_target_files")
    if len(here) != len(there):
        raise UserError(f"data.{part}_target_files: {len(there)} files for {len(here)} of sources. Give one for each")
    skipped = Skipped()
    for source, target in zip(here, there, strict=True):
        for number, (one, other) in enumerate(zip_longest(_texts(source), _texts(target)), start=1):
            if one is None or other is None:
                longer, shorter = (source, target) if other is None else (target, source)
                raise UserError(
                    f"{longer}:{number}: the other file ({shorter}) has no such line. "
                    "Give files with a line for each pair"
                )
            if not skipped.lacks(f"{source}:{number}", one, other):
                yield f"{source}:{number}", one, other
    skipped.tell()


def _texts(name: str) -> Iterator[str]:
    return (line.rstrip("\n") for _, line in lines_of(name))
