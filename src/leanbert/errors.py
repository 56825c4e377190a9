"""The exceptions that a user is meant to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

REFUSED = 2
"""Exit code for bad input."""


LOST = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Application timeout")
"""What an error says where another rank has ended in the middle of an exchange, or hangs."""


class UserError(Exception):
    """Bad input: the message is one line that names the file and line, or the setting, and the fix.

    The command line prints it on standard error and exits with code 2; from Python it is an ordinary exception.
    """


class TrainingFailed(Exception):  # noqa: N818 - it tells what happened to the run, which no input shows beforehand
    """A run cannot go on for what it has computed: the message is one line with the reason and what to try.

    The command line prints it on standard error and exits with code 1.
    """


@contextmanager
def under(setting: str) -> Iterator[None]:
    """Put the setting that is to blame before what a `UserError` says."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


def require(holds: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not holds:
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def tells_of_lost_rank(error: BaseException) -> bool:
    """Return whether an error is that another rank has ended in the middle of an exchange, or hangs."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)
