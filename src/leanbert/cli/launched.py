"""What torchrun and srun, which start ranks, say of them: how many there are, and whether they are started again."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from torch.distributed import TCPStore

from leanbert.errors import UserError
from leanbert.messages import leads

STARTED = {
    "torchrun": {"devices": ("LOCAL_WORLD_SIZE", "--nproc_per_node"), "num_nodes": ("GROUP_WORLD_SIZE", "--nnodes")},
    "srun": {"devices": ("SLURM_NTASKS_PER_NODE", "--ntasks-per-node"), "num_nodes": ("SLURM_NNODES", "--nodes")},
}
"""The environment variable with the number for which a launcher has started ranks, and its option, by our setting."""
NOT_SET = {"devices": ("auto", -1, "-1"), "num_nodes": (1,)}
"""Values of settings that leave the number open."""
ALONE = ("predict", "prepare", "export", "compress")
"""Subcommands of which one process does all the work."""
GOING_ON = ("auto", "last")


def launched_by() -> str | None:
    """Return the program that has started this process as one of several ranks, None: none has."""
    if TorchElasticEnvironment.detect():
        return "torchrun"
    return "srun" if SLURMEnvironment.detect() else None


def take_launched(trainer: Any, subcommand: str) -> None:
    """Use as many devices and machines as ranks were started for.

    Raises:
        UserError: Other numbers are set, or the subcommand is for one process alone.

    """
    by = launched_by()
    if by is None and subcommand == "predict":
        take_one(trainer)
    for setting, (variable, option) in STARTED.get(by or "", {}).items():
        given, started = trainer[setting], int(os.environ.get(variable, 1))
        if given in NOT_SET[setting]:
            given = trainer[setting] = started
        if (number := number_of(given)) != started:
            raise UserError(
                f"trainer.{setting}: {number}, but {by} has started ranks for {started}. Leave it out, or give {by} "
                f"{option}={number}."
            )
        if started > 1 and subcommand in ALONE:
            raise UserError(f"{subcommand}: one process does all of it. Start it without {by}.")


def take_one(trainer: Any) -> None:
    """Use one device for `predict`, where auto would be all GPUs. Raises UserError if several are named."""
    for setting, unset in NOT_SET.items():
        if trainer[setting] in unset:
            trainer[setting] = 1
        elif number_of(trainer[setting]) > 1:
            raise UserError(f"trainer.{setting}: predict writes in input order from one device. Set it to 1.")


def number_of(given: object) -> int:
    """Return how many devices are named: a number, a list, or either as text."""
    if isinstance(given, str):
        given = given.strip(",").split(",") if "," in given else int(given) if given.isdigit() else 0
    return len(given) if isinstance(given, list) else int(str(given))


def prepare_restarts(ckpt_path: str | None) -> None:
    """See to it that ranks which torchrun starts again go on, and find each other.

    In torch 2.13 the store in which ranks find each other outlives them with their addresses: those that are started
    again get a new one, of which the first tells the others in the old one.

    Raises:
        UserError: They would begin anew, or are on several machines, which may count restarts differently.

    """
    if launched_by() != "torchrun" or not int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
        return
    if ckpt_path not in GOING_ON:
        raise UserError(
            f"--ckpt_path: is {ckpt_path or 'not given'}, and each restart by torchrun (--max-restarts) would begin "
            "there again. Give --ckpt_path auto."
        )
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True":
        return
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        raise UserError(
            "torchrun: ranks on several machines that are started again (--max-restarts) would look for dead ones. "
            "Give --rdzv_backend=c10d, and set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun."
        )
    if (attempt := os.environ["TORCHELASTIC_RESTART_COUNT"]) != "0":
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        if leads():
            store.set(f"leanbert/port/{attempt}", str(find_free_network_port()))
        os.environ["MASTER_PORT"] = store.get(f"leanbert/port/{attempt}").decode()
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
