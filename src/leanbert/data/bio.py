"""BIO tags: what is legal, and the spans and arguments that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


def check_bio(labels: Sequence[str]) -> str | None:
    """Say what is wrong with the first tag that is not legal in BIO (IOB2); None if all are.

    Legal are O, B-x and I-x, the last only after B-x or I-x of the same x. The words name the tag, its index and
    the fix, so that a reader of files has only to put file and line before them.
    """
    before = OUTSIDE
    for index, label in enumerate(labels):
        if label != OUTSIDE and not role_of(label):
            return f'tag {index} is "{label}". Tags are O, B-x or I-x, where x is a role'
        if label.startswith("I-") and role_of(before) != role_of(label):
            return f'tag {index} is "{label}" after "{before}". Begin the span with "B-{role_of(label)}"'
        before = label
    return None


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
    last: dict[str, int] = {}  # the place in `found` of the last argument of each role
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
