"""Documents out of lines and records: where they begin and end, in pieces, and a number by which to divide them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from leanbert.messages import say_once

Separator = Literal["blank_line", "line"]

PIECE_CHARACTERS = 1 << 20
"""A longer document comes in pieces of about this size."""


class Piece(NamedTuple):
    """A document or, of a long one, a part, with whether the document begins with it, and ends with it.

    Parts are cut before white space where there is any, so that tokens are the same as of the whole.
    """

    text: str
    begins: bool
    ends: bool


class Skipped:
    """Counts the records without a text, which nothing can be learned from, and says how many they were."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def lacks(self, where: str, *texts: str) -> bool:
        """Return whether one of the texts of a record is blank, and count it."""
        if all(text and not text.isspace() for text in texts):
            return False
        self.count, self.first = self.count + 1, self.first or where
        return True

    def tell(self) -> None:
        """Say how many there were, once."""
        if self.count:
            say_once(f"{self.count:,} records without text are left out, the first is {self.first}")


def document_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on the text only, not on its case and white space."""
    return text_hash(" ".join(text.casefold().split()))


def text_hash(text: str) -> float:
    """Return a number in [0, 1) that depends on each character."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_documents(lines: Iterable[str], separator: Separator) -> Iterator[tuple[str, bool]]:
    r"""Yield (text, ends) of the documents in `lines` (with their "\n"), long ones in several pieces."""
    parts: list[str] = []
    size, open_document, blank = 0, False, True
    for line in lines:
        blank, complete = blank and (line.isspace() or not line), line.endswith("\n")
        if not (blank and complete):
            parts.append(line)
            size += len(line)
        if size > PIECE_CHARACTERS:
            text = "".join(parts)
            cut = _border(text)
            yield text[:cut], False
            parts, size, open_document = [text[cut:]], len(text) - cut, True
        if complete and (blank or separator == "line") and parts:
            text, parts, size = "".join(parts).rstrip(), [], 0
            if text or open_document:
                yield text, True
            open_document = False
        blank = blank or complete
    text = "".join(parts).rstrip()
    if text or open_document:
        yield text, True


def in_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, ends) of a document, a long one in several pieces."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = start + _border(text[start : start + PIECE_CHARACTERS])
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def with_begins(parts: Iterable[tuple[str, bool]]) -> Iterator[Piece]:
    """Yield (text, ends) as pieces, the first of which begins a document."""
    begins = True
    for text, ends in parts:
        yield Piece(text, begins, ends)
        begins = ends


def _border(text: str) -> int:
    """Return where to cut: before the last white space, or at the end if there is none (Chinese)."""
    space = max(text.rfind(" "), text.rfind("\n", 0, -1))
    return len(text[: max(space, 0)].rstrip()) or len(text)
