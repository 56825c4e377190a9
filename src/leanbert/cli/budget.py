"""What planning asks of the settings, and what a budget does to them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import Any

import yaml

from leanbert.callbacks.reporting.plan import PlanReport
from leanbert.cli.launched import number_of
from leanbert.data.settings import rows_per_device
from leanbert.files import scratch_folder
from leanbert.messages import leads
from leanbert.planning.predict import TEACHER
from leanbert.planning.timing import RunLength, count_validations, limited
from leanbert.ranges import COUNT
from leanbert.settings import add_overlay


def count_devices(settings: Any) -> int:
    """Return on how many devices the run is planned. Raises UserError where they cannot share the batch evenly."""
    trainer = settings["trainer"]
    for name in ("devices", "nodes"):
        COUNT.check(f"--{name}", settings[name])
    devices = max(1, number_of(settings["devices"] or trainer["devices"]))
    count = devices * (settings["nodes"] or trainer["num_nodes"])
    rows_per_device(settings["data"]["init_args"]["batch_size"], count)
    return count


def planned_target(settings: Any, here: str) -> str:
    """Return the kind of device that is planned for; `here` is that of trainer.accelerator."""
    if settings["target"] != "auto":
        return str(settings["target"])
    # all that --device knows are CUDA devices
    return "cuda" if settings["device"] is not None and not settings["measure"] else here


def strategy_of(settings: Any) -> dict[str, Any]:
    """Return how several devices share the model, as `RunSettings` says it."""
    asked, nodes = settings["trainer"]["strategy"], settings["nodes"] or settings["trainer"]["num_nodes"]
    if isinstance(asked, str):
        kinds: dict[str, dict[str, Any]] = {
            "auto": {}, "fsdp": {"strategy": "fsdp2"}, "hsdp": {"strategy": "fsdp2", "replicas": nodes},
        }  # fmt: skip
        return kinds.get(asked, {"strategy": "ddp"})
    if not asked["class_path"].endswith("FullySharded"):
        return {"strategy": "ddp"}
    given = asked.get("init_args", {})
    replicas = given.get("replicas", 1)
    shared = {"replicas": nodes if replicas == "nodes" else replicas, "offload": given.get("offload", False)}
    return {"strategy": "fsdp2", **shared}


def apply_budget(settings: Any, arguments: list[str]) -> PlanReport:
    """Plan the run in a process of its own, whose memory is gone with it, and add the chosen techniques to it.

    `settings` are those of `fit`, which `arguments` have called; a plan that fails ends this process as it did its own.
    """
    with scratch_folder() as folder:
        answer, overlay = folder / "plan.json", folder / "overlay.yaml"
        place = arguments.index("fit")
        command = [sys.executable, sys.argv[0], *arguments[:place], "plan", *arguments[place + 1 :]]
        options = ("--prepare=true", "--first=true", f"--json={answer}", f"--save={overlay}")
        done = subprocess.run([*command, *options], stdout=sys.stderr if leads() else subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)
        plan, chosen = json.loads(answer.read_text()), yaml.safe_load(overlay.read_text()) or {}
    add_overlay(settings, chosen)
    measured = max(size for phase, size in plan["by_phase"].items() if phase != TEACHER)  # by steps and validation
    return PlanReport(measured, plan)


def run_length(trainer: Any, datamodule: Any) -> RunLength:
    """Return how many steps and validations `fit` would do with these settings of the trainer; prepares the corpus."""
    data = copy.deepcopy(datamodule)
    data.setup("fit")
    steps = trainer["max_steps"] if trainer["max_steps"] > 0 else trainer["max_epochs"] * data.batches_per_epoch
    rows = data.hparams["val_batch_size"] or data.hparams["batch_size"]
    interval = trainer["val_check_interval"]
    return RunLength(
        steps=steps,
        validations=count_validations(
            steps, 1.0 if interval is None else interval, every_n_epochs=trainer["check_val_every_n_epoch"],
            batches_per_epoch=data.batches_per_epoch,
        ),
        batches_per_validation=limited(-(-data.statistics["val"].rows // rows), trainer["limit_val_batches"]),
        training_rows=data.statistics["train"].rows,
    )  # fmt: skip
