"""BIO tags: what is legal, and the spans and arguments that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from leanbert.errors import UserError

OUTSIDE = "O"
PREDICATE = "V"
"""Role of the predicate that the arguments belong to."""
TO_FIND = "PRED"
"""Role of all predicates of a sentence in which they are to be found."""
CONTINUATION = "C-"


class Span(NamedTuple):
    """The words `start` to `end` - 1, and their role."""

    role: str
    start: int
    end: int


class Argument(NamedTuple):
    """A role and the spans of words, (start, end) each, that fill it: several if it is discontinuous."""

    role: str
    pieces: tuple[tuple[int, int], ...]


class TagReader:
    """Reads the tags of the sentences of a file as BIO (IOB2), whichever of the usual schemes they are in.

    - BIO: B-x begins a span, I-x goes on with it.
    - IOB1, as CoNLL-2003 is distributed: I-x begins a span as well; B-x only one right after another x.
    - IOBES, BILOU: E-x or L-x end a span, S-x or U-x is one of a single word.

    A file is in one scheme: an I-x that begins a span is an error where others begin with B-x.
    """

    def __init__(self) -> None:
        self._begun = ""  # where B-x begins a span as it does not in IOB1, or a span is ended, or of one word
        self._begun_inside = ""  # where I-x begins a span
        self._letters = ""

    @property
    def scheme(self) -> str:
        """Name of the scheme, as far as it was read."""
        named = "BILOU" if self._letters in ("L", "U") else "IOBES"
        return "IOB1" if self._begun_inside else named if self._letters else "BIO"

    def read(self, where: str, labels: Sequence[str]) -> list[str]:
        """Return the tags of a sentence in BIO.

        Raises UserError: a tag is not legal. Names the `where`, the tag, its index and the fix.
        """
        found, inside, before = [], "", OUTSIDE  # the role that goes on; the last tag
        for index, label in enumerate(labels):
            letter, role = label[:1], label[2:] if label[1:2] == "-" else ""
            if label != OUTSIDE and not (role and letter in "BIESLU"):
                number = ". Set data.label_names to the names of numbers" if label.isdecimal() else ""
                raise UserError(f'{where}: tag {index} is "{label}". Tags are O, B-x or I-x, where x is a role{number}')
            at = f'{where}: tag {index} is "{label}" after "{before}"'
            goes_on = letter in "IEL" and role == inside and bool(role)
            if letter in "ESLU":
                self._letters, self._begun = self._letters or letter, self._begun or where
            elif letter == "B" and before[2:] != role:
                self._begun = self._begun or where
            if letter in "IEL" and not goes_on:
                if letter != "I" or self._begun:
                    raise UserError(f'{at}. Begin the span with "B-{role}"')
                self._begun_inside = self._begun_inside or where
            if self._begun and self._begun_inside:
                raise UserError(f"{at}, but at {self._begun_inside} I- begins a span (IOB1). Use one scheme in a file")
            found.append(label if not role else f"{'I' if goes_on else 'B'}-{role}")
            inside, before = "" if letter in "OESLU" else role, label
        return found


def spans(labels: Sequence[str]) -> list[Span]:
    """Return the spans in the order of their words: B-x and the I-x that follow it without a gap.

    An I-x that continues nothing belongs to no span, as in the strict mode of `seqeval`.
    """
    found: list[Span] = []
    inside = ""  # the tag that would go on with the last span
    for index, label in enumerate(labels):
        if label.startswith("B-"):
            inside = f"I-{role_of(label)}"
            found.append(Span(role_of(label), index, index + 1))
        elif label == inside:
            found[-1] = found[-1]._replace(end=index + 1)
        else:
            inside = ""
    return found


def arguments(labels: Sequence[str]) -> list[Argument]:
    """Return the arguments as srl-eval.pl of the CoNLL-2005 shared task (Carreras and Màrquez, 2005) reads them.

    A span C-X is a further piece of the last argument X before it, whatever stands between them. A C-X without an
    X before it is an argument X, which later C-X continue. A reference (R-X) is a role like any other, and
    C-R-X continues it.
    """
    found: list[Argument] = []
    last: dict[str, int] = {}  # the index in `found` of the last argument of each role
    for span in spans(labels):
        role = span.role.removeprefix(CONTINUATION)
        piece = (span.start, span.end)
        if role != span.role and role in last:
            found[last[role]] = Argument(role, (*found[last[role]].pieces, piece))
        else:
            last[role] = len(found)
            found.append(Argument(role, (piece,)))
    return found


def role_of(label: str) -> str:
    """Return what follows B- or I-; nothing for O and what is no tag."""
    return label[2:] if label.startswith(("B-", "I-")) else ""
