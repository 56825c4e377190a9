"""Profiles of devices: fitted from logged runs, written, found, and what a plan makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from leanbert.cli.app import CLI, quiet_libraries
from leanbert.errors import UserError
from leanbert.planning import profile as profiles
from leanbert.planning.device import target_of
from leanbert.planning.profile import LoggedRun, Profile, Steps, find_profile, fit_profile, read_profile, write_profile
from leanbert.tasks.techniques import Techniques
from leanbert.units import MIB
from tests.corpus import write_corpus
from tests.training import TINY

CARD = "NVIDIA H200"
KNOWN = Profile(CARD, 500 * MIB, 0.125, {"16": Steps(0.01, 4e14)}, runs=3)


def logged(flops, seconds, device=CARD, precision="bf16-mixed", live=800, reserved=1000, context=300):
    return LoggedRun(device, precision, live * MIB, reserved * MIB, context * MIB, flops, seconds)


def test_steps_are_a_start_and_a_rate_and_memory_is_that_of_the_hungriest():
    runs = [logged(flops, 0.02 + flops / 5e14, context=400 - number) for number, flops in enumerate((1e13, 3e13, 7e13))]
    runs.append(logged(2e12, 0.25, precision="32-true", live=900, reserved=1350))
    found = fit_profile(runs)
    assert (found.device, found.base_bytes, found.slack, found.runs) == (CARD, 400 * MIB, 0.5, 4)
    assert found.steps["16"].seconds == pytest.approx(0.02)
    assert found.steps["16"].flops_per_second == pytest.approx(5e14)
    assert found.steps["32"] == Steps(0.0, pytest.approx(8e12))
    assert found.step_seconds(5 * 10**13, "16-mixed") == pytest.approx(0.12)


def test_no_step_starts_before_it_begins():
    assert fit_profile([logged(1e12, 1.0), logged(3e12, 3.5)]).steps["16"].seconds == 0.0


@pytest.mark.parametrize(("runs", "reason"), [
    ([], "runs on no device. Give those of one kind"),
    ([logged(1, 1.0), logged(1, 1.0, device="T4")], "runs on NVIDIA H200, T4. Give those of one kind"),
    ([logged(1, 1.0), logged(2, 0.5)], "larger steps did not take longer"),
])  # fmt: skip
def test_runs_that_make_no_profile(runs, reason):
    with pytest.raises(UserError, match=reason):
        fit_profile(runs)


def test_a_profile_is_read_as_it_was_written(tmp_path):
    path = write_profile(KNOWN, tmp_path / "devices")
    assert path.name == "nvidia-h200.json"
    assert read_profile(path) == KNOWN


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"steps": {"16": {"seconds": 1}}})])
def test_another_file_is_no_profile(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is no profile of a device"):
        read_profile(path)


def test_the_profile_of_a_name_of_a_file_and_of_the_device_here(monkeypatch, tmp_path):
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    path = write_profile(KNOWN, tmp_path)
    assert find_profile("nvidia-h200", "cuda") == find_profile(str(path), "cuda") == KNOWN
    assert find_profile("a100", "cuda") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: CARD)
    assert find_profile(None, "cuda") == KNOWN
    assert find_profile(None, "cpu") is None


def test_a_device_needs_what_its_profile_says():
    assert target_of("cuda", KNOWN).needs(800 * MIB, Techniques()) == (500 + 900) * MIB
    assert target_of("cuda").needs(800 * MIB, Techniques()) == (700 + 880) * MIB


def plan(folder, device, precision="bf16-mixed"):
    quiet_libraries()
    write_corpus(folder / "train.txt")
    CLI(["plan", "--config=configs/mlm.yaml", *TINY, f"--data.train_files={folder / 'train.txt'}", "--target=cuda",
         f"--trainer.precision={precision}", f"--device={device}", f"--json={folder / 'plan.json'}"])  # fmt: skip
    return json.loads((folder / "plan.json").read_text())


def test_a_plan_goes_by_the_profile(tmp_path, capsys):
    path = write_profile(KNOWN, tmp_path)
    found = plan(tmp_path, path)
    assert found["process_base_bytes"] == 500 * MIB
    assert found["predicted_needs_bytes"] == 500 * MIB + round(found["predicted_peak_bytes"] * 1.125)
    assert found["estimate"] == {"device": str(path), "seconds_per_step": 0.01 + found["flops_per_step"] / 4e14}
    assert "Time, estimated for NVIDIA H200: 0.01 s a step" in capsys.readouterr().out
    with pytest.raises(UserError, match="was measured in 16 bits only, not in 32-true"):
        plan(tmp_path, path, "32-true")


def write_run(folder: Path, flops: int, seconds: float, reserved: list[float], used: list[float]) -> Path:
    """Write what a run of 20 steps of 1,000 tokens leaves."""
    folder.mkdir()
    summary = {"device": CARD, "precision": "bf16-mixed", "peak_bytes": 800 * MIB, "tokens": 20_000, "steps": 20}
    (folder / "summary.json").write_text(json.dumps({**summary, "tokens_per_second": 1000 / seconds}))
    (folder / "plan.json").write_text(json.dumps({"flops_per_step": flops}))
    with SummaryWriter(str(folder)) as writer:
        for step, (held, given) in enumerate(zip(reserved, used, strict=True)):
            writer.add_scalar("memory/reserved_mib", held, step)
            writer.add_scalar("memory/device_used_mib", given, step)
    return folder


def test_a_profile_is_fitted_from_the_folders_of_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from plan_logs import write_fitted

    runs = [
        write_run(tmp_path / "one", 10**13, 0.045, [900.0, 1000.0], [1400.0, 1510.0]),
        write_run(tmp_path / "two", 3 * 10**13, 0.095, [880.0, 1200.0], [1290.0, 1650.0]),
    ]
    found = read_profile(write_fitted(runs, tmp_path / "devices"))
    assert (found.device, found.base_bytes, found.slack, found.runs) == (CARD, 500 * MIB, 0.5, 2)
    assert found.steps["16"].seconds == pytest.approx(0.02)
    assert found.steps["16"].flops_per_second == pytest.approx(4e14)
    (tmp_path / "two" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"plan\.json: is missing\. Give folders of runs of fit --budget"):
        write_fitted(runs, tmp_path / "devices")
