"""What the environment of torchrun and srun decides, and what contradicts it."""

from __future__ import annotations

import os
import warnings

import pytest
from torch.distributed import TCPStore

from leanbert.cli.app import quiet_libraries
from leanbert.cli.launched import prepare_restarts, take_launched
from leanbert.cli.resume import resume_command
from leanbert.errors import UserError

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "3",
    "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
SRUN = {"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3"}


@pytest.fixture(params=["torchrun", "srun"])
def launcher(request, monkeypatch):
    for name, value in {"torchrun": TORCHRUN, "srun": SRUN}[request.param].items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.mark.parametrize("devices", ["auto", -1, "-1", 2, "2", [0, 1], "0,1"])
def test_devices_are_those_that_ranks_were_started_for(launcher, devices):
    trainer = {"devices": devices, "num_nodes": 1}
    take_launched(trainer, "fit")
    assert trainer == {"devices": devices if devices not in ("auto", -1, "-1") else 2, "num_nodes": 3}


def test_without_a_launcher_settings_stay():
    trainer = {"devices": "auto", "num_nodes": 2}
    take_launched(trainer, "export")
    assert trainer == {"devices": "auto", "num_nodes": 2}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"devices": 4, "num_nodes": 1}, r"trainer\.devices: 4, but {} .* for 2\. Leave it out, or give {} {}=4"),
        (
            {"devices": "auto", "num_nodes": 2},
            r"trainer\.num_nodes: 2, but {} .* for 3\. Leave it out, or give {} {}=2",
        ),
    ],
)
def test_other_numbers_are_refused_with_the_option(launcher, given, says):
    options = {"torchrun": ("--nproc_per_node", "--nnodes"), "srun": ("--ntasks-per-node", "--nodes")}[launcher]
    option = options["num_nodes" in says]
    with pytest.raises(UserError, match=says.format(launcher, launcher, option)):
        take_launched(given, "fit")


@pytest.mark.parametrize("subcommand", ["predict", "export"])
def test_what_one_process_does_is_not_done_by_many(launcher, subcommand):
    with pytest.raises(UserError, match=f"{subcommand}: one process does all of it. Start it without {launcher}"):
        take_launched({"devices": "auto", "num_nodes": 1}, subcommand)


@pytest.mark.parametrize(("devices", "used"), [("auto", 1), (-1, 1), (1, 1), ([3], [3])])
def test_predict_takes_one_device_of_several(devices, used):
    trainer = {"devices": devices, "num_nodes": 1}
    take_launched(trainer, "predict")
    assert trainer == {"devices": used, "num_nodes": 1}


@pytest.mark.parametrize("given", [{"devices": 2}, {"devices": "0,1"}, {"num_nodes": 2}])
def test_predict_refuses_several_devices(given):
    [setting] = given
    with pytest.raises(UserError, match=rf"trainer\.{setting}: predict writes in input order .* Set it to 1"):
        take_launched({"devices": 1, "num_nodes": 1} | given, "predict")


@pytest.fixture
def restarts(monkeypatch):
    for name, value in {**TORCHRUN, "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("given", [None, "best", "step.ckpt"])
def test_restarts_that_would_begin_anew_are_refused(restarts, given):
    with pytest.raises(UserError, match=r"--ckpt_path: is .* Give --ckpt_path auto"):
        prepare_restarts(given)
    restarts.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    prepare_restarts(given)


def test_restarts_on_several_machines_need_a_new_store(restarts):
    restarts.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        prepare_restarts("auto")
    restarts.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    prepare_restarts("auto")


def test_ranks_that_are_started_again_meet_in_a_new_store(restarts):
    old = TCPStore("127.0.0.1", 0, is_master=True)
    found = []
    for attempt, rank in (("0", "0"), ("1", "0"), ("1", "1"), ("2", "0")):
        restarts.setattr("leanbert.cli.launched.leads", lambda first=rank == "0": first)
        restarts.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        restarts.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        restarts.setenv("MASTER_ADDR", "127.0.0.1")
        restarts.setenv("MASTER_PORT", str(old.port))
        prepare_restarts("auto")
        found.append((os.environ["MASTER_PORT"], os.environ["TORCHELASTIC_USE_AGENT_STORE"]))
    (first, shared), (second, own), (third, others), (fourth, _) = found
    assert (first, shared) == (str(old.port), "True")
    assert second == third != first != fourth != second
    assert own == others == "False"


def test_the_command_that_goes_on_starts_the_ranks_too(launcher, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    program = {"torchrun": "torchrun ... train.py", "srun": "srun ... python train.py"}[launcher]
    assert resume_command(["fit", "--ckpt_path", "auto"]) == f"{program} fit --ckpt_path last"


@pytest.mark.parametrize("job", [None, "7"])
def test_srun_is_asked_for_in_a_job_only(monkeypatch, job):
    """Lightning warns wherever the program is installed: on a login node, of every command."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("The `srun` command is available on your system but is not used.", stacklevel=1)
    assert len(found) == (job is not None)
