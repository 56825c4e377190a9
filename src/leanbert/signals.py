"""Ctrl-C and SIGTERM, from the first line of the program to its last: a message, nothing half-written, 130 or 143.

The handler raises nothing: an exception that starts inside an import, a destructor or a callback from C is lost
there, or ends as a traceback. It ends the process itself, unless something has asked to end it in order (`defer_to`).
Standard library only: this is imported before anything that takes time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from leanbert.ranks import launched_rank

SIGNALS = (signal.SIGINT, signal.SIGTERM)

LEADER = "LEANBERT_LEADER"
"""Environment variable with the process that answers a signal for those that it has started (ranks, a plan)."""

PATIENCE_SECONDS = 2.0
"""How long the main thread may take to answer: in a call of foreign code it cannot, however long that takes."""

ECHO_SECONDS = 1.0
"""How long a signal counts as the one before: `timeout`, and others that start a program, pass on what it got too."""

GO_ON = "A training goes on with --ckpt_path last."

ORPHAN_SECONDS = 10.0
"""How long a rank may live on without the process that started it: at the end of a run they end one by one."""

temporary: set[str] = set()
"""Files and folders that are being written, to be removed when a signal ends the process."""


class _State:
    installed = False
    answered_at = 0.0
    deferred_at = -ECHO_SECONDS
    hint: Callable[[], str] = str
    receiver: Callable[[int], None] | None = None


def install() -> Callable[[], None]:
    """Take over the signals and return what gives them back; outside the main thread Python does not allow it."""
    if threading.current_thread() is not threading.main_thread():
        return nothing
    leader, installed = os.environ.get(LEADER), _State.installed
    if not follows():
        os.environ[LEADER] = str(os.getpid())
    previous = handlers()
    for number in SIGNALS:
        signal.signal(number, _receive)
    if not installed:
        atexit.register(_ignore)  # the first to be registered is the last to be called
    _State.installed = True

    def restore() -> None:
        give_back(previous)
        _State.installed = installed
        os.environ.pop(LEADER)
        if leader is not None:
            os.environ[LEADER] = leader

    return restore


def _ignore() -> None:
    """Ignore signals from now on: on its way out Python would let one end what is done as if it had failed."""
    for number, handler in handlers().items():
        if handler is _receive:
            signal.signal(number, signal.SIG_IGN)


def watch() -> None:
    """End the program from a thread of its own where the main thread is too long in foreign code to answer.

    A rank ends so when the process that started it has: Lightning's first rank, torchrun, or srun.
    """
    if "LOCAL_RANK" in os.environ:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True, name="parent").start()
    if threading.current_thread() is threading.main_thread() and not follows():
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()


def _watch(reader: int) -> None:
    while numbers := os.read(reader, 4096):
        arrived = time.monotonic()
        for number in SIGNALS:
            if number in numbers:
                time.sleep(PATIENCE_SECONDS)
                if _State.answered_at < arrived - PATIENCE_SECONDS and _State.receiver is None:
                    _end(number)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(ORPHAN_SECONDS)
    starter = "rank 0" if orphaned() else "torchrun, or what else started it,"
    end_at_once(1, f"error: rank {launched_rank()}: {starter} has ended. {GO_ON}")


def nothing() -> None:
    """Do nothing: what is to be given back where nothing was taken."""


def handlers() -> dict[signal.Signals, Any]:
    """Return who answers the signals."""
    return {number: signal.getsignal(number) for number in SIGNALS}


def give_back(previous: dict[signal.Signals, Any]) -> None:
    """Let those answer who did when `handlers` was called."""
    for number, handler in previous.items():
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)


def follows() -> bool:
    """Return whether the process that started this one answers signals for it."""
    return os.environ.get(LEADER) == str(os.getppid())


def orphaned() -> bool:
    """Return whether the first rank, which started this one, has ended."""
    return os.environ.get(LEADER, "") not in ("", str(os.getpid()), str(os.getppid()))


def hint(words: Callable[[], str]) -> None:
    """Set what returns, when a signal ends the process, what the last message says after the signal's name."""
    _State.hint = words


def defer_to(receiver: Callable[[int], None] | None) -> None:
    """Give the next signal to `receiver`, which sees to the end; None: a signal ends the process at once."""
    _State.receiver = receiver


def write(line: str) -> None:
    """Write a line to standard error past its buffer, which the signal may have found in use."""
    with contextlib.suppress(OSError):
        start = "\n" if os.isatty(2) else ""  # below a progress bar
        os.write(2, f"{start}{line}\n".encode(errors="replace"))


@contextmanager
def held(pass_on: Callable[[int], object] = lambda number: None) -> Iterator[None]:
    """Let a signal wait for the end of the block, in which nothing is to be cut in half; a second one ends at once.

    `pass_on` is told meanwhile which it is.
    """
    received: list[int] = []

    def receive(number: int) -> None:
        received.append(number)
        pass_on(number)

    defer_to(receive)
    try:
        yield
    finally:
        defer_to(None)
    if received:
        _end(received[0])


def run(command: list[str]) -> int:
    """Run a command that answers signals itself, such as a training that saves, and return its exit code.

    What this process is told meanwhile it passes on, and ends as it was told once the command has.
    """
    environment = {name: value for name, value in os.environ.items() if name != LEADER}
    with (
        subprocess.Popen(command, stdout=sys.stderr, env=environment, start_new_session=True) as child,
        held(child.send_signal),
    ):
        return child.wait()


def _receive(number: int, frame: object) -> None:
    _State.answered_at = time.monotonic()
    receiver, _State.receiver = _State.receiver, None
    if receiver is not None:
        _State.deferred_at = _State.answered_at
        receiver(number)
    elif not follows() and _State.answered_at >= _State.deferred_at + ECHO_SECONDS:
        _end(number)


def _end(number: int) -> None:
    """End this process and those that it has started."""
    if threading.current_thread() is threading.main_thread():
        for other in {*SIGNALS, getattr(signal, "SIGCHLD", signal.SIGINT)}:  # torch raises when it hears of a death
            signal.signal(other, signal.SIG_IGN)
    words = f"Stopped by {signal.Signals(number).name}. {_State.hint()}".rstrip()
    end_at_once(128 + number, words if launched_rank() == 0 else None)  # torchrun passes a signal on to all ranks


def end_at_once(code: int, words: str | None) -> None:
    """End this process, from whatever thread, and those that it has started; nothing half-written stays."""
    kill_children()
    for path in list(temporary):
        remove(path)
    if words is not None:
        write(words)
    os._exit(code)


def kill_children() -> None:
    """End all processes that this one has started."""
    psutil: Any = sys.modules.get("psutil")  # not imported: nothing has been started
    tracker: Any = sys.modules.get("multiprocessing.resource_tracker")  # removes the semaphores, and ends by itself
    spared = getattr(getattr(tracker, "_resource_tracker", None), "_pid", None)
    if hasattr(psutil, "Process"):
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if child.pid != spared:
                        child.kill()


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or a folder, whichever it is, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def _in_forked_process() -> None:
    # A worker: Ctrl-C, which a terminal sends to all processes, is for the one that it works for.
    if _State.installed:
        temporary.clear()
        _State.receiver, _State.installed = None, False
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def deaf_children() -> Iterator[None]:
    """Start processes in this block that do not hear Ctrl-C: it is for this one, which ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_process)
