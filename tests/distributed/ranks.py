"""Processes of a group that run a function each: gloo on this machine."""

from __future__ import annotations

import os
import socket
import traceback

import torch


def _run(rank, world_size, port, function, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(rank), None))
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
        os._exit(1)
    torch.distributed.barrier()
    os._exit(0)  # taking the process group down has hung on a busy machine


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(function, world_size=2):
    """Return what `function(rank)` returns on each rank, by rank; it is a module's, and returns numbers or arrays."""
    port = free_port()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(rank, world_size, port, function, queue)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = {}
    for _ in processes:
        rank, found[rank], failure = queue.get()
        if failure is not None:  # the others may wait for it
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank}: {failure}")
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [found[rank] for rank in range(world_size)]
