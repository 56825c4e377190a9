"""Lightning's launcher, which starts the ranks of this machine, and what it says when one of them ends."""

from __future__ import annotations

import atexit
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from leanbert import signals
from leanbert.callbacks.loop.interrupt import Interrupted
from leanbert.errors import REFUSED, UserError, tells_of_lost_rank

POLL_SECONDS = 0.5
SUMMARY_SECONDS = 1.0
"""How long the first rank may still write its summary, once another one has ended."""
MEETING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""Environment variables by which ranks that are started by hand on several machines find each other."""


class Launcher(_SubprocessScriptLauncher):
    """Ends all ranks when one of them has ended before its time, says which and how, and leaves with its exit code.

    Lightning's own observer would kill this process, every five seconds, and leave nothing but its number.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other ranks, unless torchrun or srun has, and call the function.

        Raises:
            UserError: Nobody starts those of other machines.

        """
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            if self.num_nodes > 1:
                meet(self.num_nodes, self.num_processes)
            self._call_children_scripts()
            atexit.register(self._end_others, signals.ORPHAN_SECONDS)
            threading.Thread(target=self._observe, daemon=True, name="ranks").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not (isinstance(error, Interrupted) or tells_of_lost_rank(error)):  # which others meet too
                self._end_others(0)  # they wait for this rank to say it
            raise

    def _end_others(self, seconds: float) -> None:
        """Kill the ranks that do not end by themselves: one that is frozen does not notice that this one has."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(process.poll() is None for process in self.procs):
            time.sleep(POLL_SECONDS / 10)
        others, self.procs = self.procs, []
        for process in others:
            process.kill()

    def _observe(self) -> None:
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(POLL_SECONDS)
            codes = [process.poll() for process in self.procs]
        failed = {number: code for number, code in enumerate(codes, 1) if code}
        if failed:
            number = min(failed, key=lambda number: failed[number])  # killed before failed
            rank = self.cluster_environment.node_rank() * self.num_processes + number
            signals.kill_children()
            time.sleep(SUMMARY_SECONDS)
            signals.end_at_once(max(failed[number], 1), ending(rank, failed[number]))


def meet(nodes: int, devices: int) -> None:
    """Say where the ranks of all machines meet. Raises UserError, with torchrun's command, if that is not set."""
    if not all(name in os.environ for name in MEETING):
        raise UserError(
            f"trainer.num_nodes: {nodes}, and nothing starts the ranks of the other machines. Give this on each, with "
            f"its own number from 0 on: torchrun --nnodes={nodes} --node_rank=NUMBER --master_addr=ADDRESS_OF_0 "
            f"--nproc_per_node={devices} {shlex.join(sys.argv)}"
        )
    address, port, number = (os.environ[name] for name in MEETING)
    signals.write(f"Machine {number} of {nodes}: waits until all have been started, at {address}:{port}")


def ending(rank: int, code: int) -> str | None:
    """Return what is to be said of a rank that has ended with a code, None: it has said so itself."""
    if code == REFUSED:
        return None
    if code > 0:
        return f"error: rank {rank} has failed with exit code {code}, see above."
    hint = " (the system does so when its memory is full)" if code == -signal.SIGKILL else ""
    name = signal.Signals(-code).name
    return f"error: rank {rank} was ended by {name}{hint}. {signals.GO_ON}"
