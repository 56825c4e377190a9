"""The prose of a docstring: without examples, headings, markup and tables."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

SMALLEST_WORDS = 4
SMALLEST_LETTER_FRACTION = 0.75
"""Of a paragraph's characters other than spaces; formulas, tables and code have fewer letters."""

_UNDERLINE = re.compile(r"\s*([-=~^*#\"'`+])\1{2,}\s*$")
_DIRECTIVE = re.compile(r"\s*\.\. ?([\w:.-]*)::.*$")
_CODE_DIRECTIVES = {"code-block", "code", "sourcecode", "testcode", "testsetup", "testoutput", "doctest", "math"}
_PROMPT = re.compile(r"\s*(>>>|\.\.\. |In \[\d+\]:|\$ )")
_FIELD = re.compile(r"^\s*:(?:param|parameter|arg|type|keyword|raises?|returns?|rtype|yields?|var|ivar)\b\s*([^:]*):")
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}")
_LITERAL = re.compile(r"`{1,3}([^`]*)`{1,3}_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)\*{1,2}(?=\S)([^*]+?)(?<=\S)\*{1,2}(?!\w)")
_PLACEHOLDER = re.compile(r"\{\w*\}")


def prose_paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs of prose, each on one line."""
    cleaned = (_clean(block) for block in _blocks(inspect.cleandoc(docstring)))
    return [paragraph for paragraph in cleaned if _is_prose(paragraph)]


def _blocks(text: str) -> Iterator[list[str]]:
    """Yield runs of lines between blank ones, without the indented blocks that hold code."""
    code_indent: int | None = None
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        if code_indent is not None and indent > code_indent:
            continue
        code_indent = indent if _announces_code(lines) else None
        yield lines


def _announces_code(lines: list[str]) -> bool:
    directive = _DIRECTIVE.match(lines[0])
    if directive:
        return directive.group(1) in _CODE_DIRECTIVES
    return lines[-1].rstrip().endswith("::")


def _clean(lines: list[str]) -> str:
    return " ".join(" ".join(_plain(line) for line in _without_furniture(lines)).split())


def _without_furniture(lines: list[str]) -> Iterator[str]:
    """Yield the lines that are neither heading, directive nor, from the first prompt on, example."""
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if _PROMPT.match(line):
            return
        directive = _DIRECTIVE.match(line)
        if directive and directive.group(1) in _CODE_DIRECTIVES:
            return
        if not (directive or _UNDERLINE.match(line) or _UNDERLINE.match(following)):
            yield line


def _plain(line: str) -> str:
    line = _FIELD.sub(r"\1:", line)
    for markup in (_ROLE, _LINK, _LITERAL, _EMPHASIS):
        line = markup.sub(r"\1", line)
    line = _PLACEHOLDER.sub("", line)
    return line.rstrip().removesuffix("::") + ":" if line.rstrip().endswith("::") else line


def _is_prose(paragraph: str) -> bool:
    solid = paragraph.replace(" ", "")
    letters = sum(map(str.isalpha, solid))
    words = paragraph.count(" ") + 1 if paragraph.isprintable() else 0  # control characters are no text
    return words >= SMALLEST_WORDS and letters >= SMALLEST_LETTER_FRACTION * len(solid)
