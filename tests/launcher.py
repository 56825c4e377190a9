"""Passes a command of `train.py` on to a process that is forked from one which has imported the libraries already.

    python tests/launcher.py fit --config configs/mlm.yaml

Importing takes several seconds of each process, more than most commands of the tests. Directory, environment, standard
streams and exit code are those of the caller; a signal to the caller is not passed on. The fixture `launcher_socket`
keeps the server of a test session and names its socket in `SOCKET`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SOCKET = "LEANBERT_TEST_SOCKET"
PROGRAM = Path(__file__).parents[1] / "train.py"
MESSAGE_BYTES = 2**20


def pass_on(arguments: list[str]) -> int:
    """Run a command by the server and return its exit code."""
    request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET])
        socket.send_fds(connection, [request], [0, 1, 2])
        return int(connection.recv(16) or 1)


@contextlib.contextmanager
def serving(path: Path, environment: dict[str, str]) -> Iterator[None]:
    """Keep a server at the socket `path`; it also ends with this process."""
    words = [sys.executable, __file__, "--serve", str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=environment) as server:
        while not path.exists():
            assert server.poll() is None
            time.sleep(0.05)
        yield
        assert server.stdin is not None
        server.stdin.close()


def serve(path: str) -> list[str] | None:
    """Answer callers until standard input ends. In the process of a command return its arguments."""
    importlib.import_module("leanbert.cli.deferred").install()
    importlib.import_module("leanbert.cli.app")  # what all commands share

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    server.close()
                    return answer(connection)
    return None


def answer(connection: socket.socket) -> list[str]:
    """Become the process of the command and return its arguments; another process sends its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
    request = json.loads(message)
    if (child := os.fork()) != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(code).encode())
        os._exit(0)
    connection.close()
    for place, stream in enumerate(streams):
        os.dup2(stream, place)
        os.close(stream)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - whether it can seek is asked once
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return list(request["arguments"])


if __name__ == "__main__":
    if sys.argv[1:2] != ["--serve"]:
        sys.exit(pass_on(sys.argv[1:]))
    arguments = serve(sys.argv[2])
    if arguments is not None:
        from leanbert.cli import main

        sys.argv = [str(PROGRAM), *arguments]
        main()
