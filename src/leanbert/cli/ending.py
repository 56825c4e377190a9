"""How the program ends: bad input is one line on standard error and an exit code.

Of several ranks the first speaks, which mostly meets the same error; another one only where the first does not.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from leanbert import signals
from leanbert.errors import REFUSED, TrainingFailed, UserError, tells_of_lost_rank
from leanbert.files import DISK_FULL
from leanbert.messages import rank

LONGEST_MESSAGE = 1000
"""Characters of an error: what was given may be very long."""
FIRST_SECONDS = 3.0
"""How long a rank lets the first one speak, after which whoever started the ranks ends them."""
LOST_SECONDS = 10.0
"""How long a rank that has lost another one lets those speak who know which one."""
LATE = ("timed out", "timeout")
"""What it says where another rank has not answered within the time that the strategy gives it."""
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
    except RuntimeError as error:
        if not tells_of_lost_rank(error):
            raise
        wait_for_the_end(LOST_SECONDS, code=1)  # which rank has ended, and how, whoever started the ranks knows
        which = "rank 0 has ended" if signals.orphaned() else "another rank has ended, or cannot be reached"
        if any(sign in str(error).lower() for sign in LATE):
            which = "another rank has not answered in time: it hangs, or cannot be reached"
        # ranks that hang end with the one that has started them
        fail(f"{which}. {signals.GO_ON}", error, code=1, leave=lambda code: signals.end_at_once(code, None))
    except OSError as error:
        gone = isinstance(error, BrokenPipeError) and reader_has_gone()
        drop_output()
        if gone:
            sys.exit(READER_HAS_GONE)
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)
        fail(f"{error.filename or 'output'}: {reason}. Mend that, or choose another file or folder.", error)


def fail(message: str, error: BaseException, code: int = REFUSED, leave: Callable[[int], object] = sys.exit) -> None:
    """Print the message as one line and leave with an exit code; LEANBERT_DEBUG=1 shows the traceback instead."""
    if os.environ.get("LEANBERT_DEBUG") == "1":
        raise error
    message, half = " ".join(message.split()), LONGEST_MESSAGE // 2
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:half]} ... {message[-half:]}"
    if rank() > 0:
        # the first of each machine speaks before the others
        wait_for_the_end(FIRST_SECONDS + (os.environ.get("LOCAL_RANK", "0") != "0"), code)
        message = f"rank {rank()}: {message}"
    tqdm.write(f"error: {message}", file=sys.stderr)
    leave(code)


def wait_for_the_end(seconds: float, code: int) -> None:
    """Give whoever knows more the time to speak; told to end meanwhile, this process leaves with `code`."""
    signals.defer_to(lambda number: os._exit(code))
    time.sleep(seconds)


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
