"""Commands and functions in forked processes: the libraries are imported once, so that a start costs milliseconds."""

from __future__ import annotations

import ast
import atexit
import contextlib
import functools
import inspect
import io
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "train.py"
TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.004


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code (negative: the signal), what it said, and what it took."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float
    rss_bytes: int

    @property
    def problem(self) -> str | None:
        """What is against the contract of every command: a traceback, an end by a signal, or no single error line."""
        if "Traceback (most recent call last)" in self.stderr:
            return f"traceback: {self.stderr.strip().splitlines()[-1][:300]}"
        if self.code < 0:
            return f"ended by signal {-self.code}"
        errors = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        if self.code == 2 and len(errors) != 1:
            return f"{len(errors)} error lines: {self.stderr[-300:]!r}"
        if self.code not in (0, 2):
            return f"exit code {self.code}: {self.stderr[-300:]!r}"
        return None


class Process:
    """A forked process that calls a function in a folder, with standard streams of its own."""

    def __init__(self, function: Callable[[], object], folder: Path, stdin: bytes = b"") -> None:
        self.input, self.stdout, self.stderr = (tempfile.TemporaryFile() for _ in range(3))  # noqa: SIM115
        self.input.write(stdin)
        self.input.seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            become((self.input, self.stdout, self.stderr), folder, function)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process, not to those that it started."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT_SECONDS, orphans: bool = False) -> Outcome:
        """Return how it ended; one that hangs is killed. Unless `orphans` may live on, what it started is killed."""
        deadline = self.started + timeout
        while (found := os.wait4(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                self.kill()
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        if not orphans:
            kill_group(self.pid)
        _, status, usage = found
        out, err = (_text(stream) for stream in (self.stdout, self.stderr))
        seconds = time.monotonic() - self.started
        cpu_seconds = usage.ru_utime + usage.ru_stime
        return Outcome(os.waitstatus_to_exitcode(status), out, err, seconds, cpu_seconds, usage.ru_maxrss * 1024)


def kill_group(group: int) -> None:
    """End what a process has started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def call(function: Callable[[], object], folder: Path, timeout: float = TIMEOUT_SECONDS, stdin: bytes = b"") -> Outcome:
    """Return how a function ended in a process of its own."""
    return Process(function, folder, stdin).wait(timeout)


def command(arguments: Sequence[str], before: Callable[[], object] | None = None) -> Callable[[], None]:
    """Return the call of `train.py` with `arguments`, after `before` has armed a fault in its process."""

    def run() -> None:
        from leanbert.cli import main

        sys.argv = [str(PROGRAM), *arguments]
        if before is not None:
            before()
        main()

    return run


def become(streams: Sequence[BinaryIO], folder: Path, function: Callable[[], object]) -> NoReturn:
    """Call the function as the main program of this process, and end as Python does."""
    code = 1
    try:
        os.setsid()
        for place, stream in enumerate(streams):
            os.dup2(stream.fileno(), place)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(place, "rw"[place > 0]) for place in range(3))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for the writers of loggers
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def once(path: Path, make: Callable[[], Any]) -> Any:
    """Return what `make` returns, which is called by the first of all processes that ask for it; `path` keeps it."""
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    return pickle.loads(path.read_bytes())


def fresh(folder: Path) -> Path:
    """Remove what an earlier experiment has left."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def import_all() -> None:
    """Import what commands import, here, for all that are forked from this process."""
    sys.path.insert(0, str(ROOT))  # tests have what trains and reads
    import docstring_parser
    import torch

    import leanbert.api
    import leanbert.cli.app
    import leanbert.planning.command
    from leanbert.callbacks.reporting import memory_monitor  # noqa: F401
    from leanbert.tasks import classification, mlm, seq2seq, tagging  # noqa: F401

    torch.set_num_threads(1)
    # docstrings and signatures of the same classes are parsed for --help by every command
    ast.parse = functools.cache(ast.parse)
    inspect.getsource = functools.cache(inspect.getsource)
    docstring_parser.parse_from_object = functools.cache(docstring_parser.parse_from_object)
    for config in ("mlm", "classification", "srl", "translation"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            leanbert.cli.app.run(["fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--print_config"])


def _text(stream: BinaryIO) -> str:
    stream.seek(0)
    text = stream.read().decode("utf-8", "replace")
    stream.close()
    return text
