"""The program's entry: signals are answered before the libraries are imported, which takes seconds."""

from __future__ import annotations

import io
import os
import sys

from leanbert import signals


def main() -> None:
    """Run the command line of `sys.argv`; bad input ends with one line on standard error and exit code 2."""
    signals.install()
    signals.watch()
    prepare_streams()
    from leanbert.cli import deferred
    from leanbert.cli.ending import one_line_errors
    from leanbert.cli.help import answer

    with one_line_errors():
        if answer(sys.argv[1:]):
            return
        deferred.install()
        from leanbert.cli import app

        app.run(sys.argv[1:])


def prepare_streams() -> None:
    """Let standard output be UTF-8, as JSON is, and fail where it is closed; a file that is opened must not be it."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # writing answers fails, messages vanish
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogatepass")
