"""How the program ends: bad input is one line on standard error and an exit code."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from leanbert.errors import TrainingFailed, UserError
from leanbert.files import DISK_FULL
from leanbert.messages import say

LONGEST_MESSAGE = 1000
"""Characters of an error: what was given may be very long."""
READER_HAS_GONE = 141
"""Exit code where nobody reads standard output any longer, as behind `| head`: what a shell gives for SIGPIPE."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Run the block; bad input, a run that failed and a file that cannot be written end the program with one line."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except TrainingFailed as error:
        fail(str(error), error, code=1)
    except UserError as error:
        fail(str(error), error)
    except OSError as error:
        gone = isinstance(error, BrokenPipeError) and reader_has_gone()
        drop_output()
        if gone:
            sys.exit(READER_HAS_GONE)
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)
        fail(f"{error.filename or 'output'}: {reason}. Mend that, or choose another file or folder.", error)


def fail(message: str, error: BaseException, code: int = 2) -> None:
    """Print the message as one line and leave with an exit code; LEANBERT_DEBUG=1 shows the traceback instead."""
    if os.environ.get("LEANBERT_DEBUG") == "1":
        raise error
    message, half = " ".join(message.split()), LONGEST_MESSAGE // 2
    say(f"error: {message if len(message) <= LONGEST_MESSAGE else f'{message[:half]} ... {message[-half:]}'}")
    sys.exit(code)


def drop_output() -> None:
    """Forget what cannot be written: Python would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def reader_has_gone() -> bool:
    """Return whether nobody reads standard output any longer."""
    if not hasattr(select, "poll"):  # Windows
        return True
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))
