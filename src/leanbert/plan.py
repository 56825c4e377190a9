"""The `plan` command: what a configuration needs, and which techniques fit it into a budget."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from tqdm import tqdm

from leanbert.callbacks.report import write_json
from leanbert.data.storage import write_text_atomically
from leanbert.errors import UserError
from leanbert.memory.candidates import COSTS, Candidate, Plan, search
from leanbert.memory.rehearsal import RunSettings
from leanbert.memory.targets import DeviceType, Target, target_of
from leanbert.memory.timeline import CATEGORIES
from leanbert.settings import find_shipped
from leanbert.units import MIB, format_size, parse_size

MARGIN = 0.1
"""Share of what the device has free that `--budget auto` leaves to others."""
SIZES = ("large", "base", "small", "mini")


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks of `plan`: budget (a size, auto or None), files to write."""

    budget: str | None = None
    json: Path | None = None
    save: Path | None = None


def run_plan(settings: RunSettings, device_type: DeviceType, request: PlanRequest) -> Plan:
    """Print the plan, and write what was asked for.

    Raises UserError if nothing fits the budget, after the JSON is written, or for a budget that is no size.
    """
    target = target_of(device_type)
    budget = budget_bytes(request.budget, device_type)
    plan = search(settings, target, budget, progress)
    print("\n".join(describe(plan, target)))
    if request.json is not None:
        write_json(request.json, as_json(plan, target))
    if plan.chosen is None:
        raise UserError(nothing_fits(plan, settings, target))
    if request.save is not None:
        overlay = yaml.safe_dump(plan.chosen.overlay, sort_keys=False) if plan.chosen.overlay else "{}\n"
        write_text_atomically(request.save, f"# {', '.join(plan.chosen.techniques) or 'nothing to add'}\n{overlay}")
    return plan


def progress(sets: list[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield the sets of techniques with a bar on standard error."""
    yield from tqdm(sets, desc="Planning", unit="set", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())


def budget_bytes(text: str | None, device_type: DeviceType) -> int | None:
    """Return the budget: of `auto` what the device has free less a tenth.

    Raises UserError for a text that is no size, or for auto where there is no such device.
    """
    if text is None:
        return None
    if text != "auto":
        return parse_size(text, "budget")
    if device_type == "cpu":
        return round(psutil.virtual_memory().available * (1 - MARGIN))
    if device_type == "cuda" and torch.cuda.is_available():
        return round(torch.cuda.mem_get_info()[0] * (1 - MARGIN))
    raise UserError(f"budget: auto asks the device, and there is no {device_type} here. Give a size such as 8GiB.")


def describe(plan: Plan, target: Target) -> list[str]:
    """Return the plan as lines: the given configuration by phase and category, the candidates, the choice."""
    given = plan.given
    lines = [f"{'As given, MiB':<14}{'peak':>10}" + "".join(f"{name:>12}" for name in CATEGORIES)]
    for phase, categories in given.prediction.phases.items():
        sizes = [categories[name] / MIB for name in CATEGORIES]
        lines.append(f"{phase:<14}{sum(sizes):>10,.1f}" + "".join(f"{size:>12,.1f}" for size in sizes))
    beyond = "process and allocator" if target.device_type == "cpu" else "context and allocator"
    lines += [f"On {target.device_type} with {beyond}: {format_size(given.needs_bytes)}", ""]
    lines.append(f"{'needs':>10}{'live':>12}{'micro-batch':>13}{'compute':>9}{'fits':>6}  techniques")
    for candidate in plan.candidates:
        fits = "" if plan.budget_bytes is None else "yes" if plan.fits(candidate) else "no"
        mark = "*" if candidate is plan.chosen and plan.budget_bytes is not None else " "
        names = " + ".join(candidate.techniques) or "as given"
        lines.append(
            f"{mark}{format_size(candidate.needs_bytes):>9}{format_size(candidate.prediction.peak_bytes):>12}"
            f"{candidate.micro_batch:>13,}{candidate.added_compute:>+9.0%}{fits:>6}  {names}"
        )
    used = dict.fromkeys(name for candidate in plan.candidates for name in candidate.techniques)
    lines += ["", "Besides compute they cost"]
    lines += [f"  {name:<24}{COSTS[name]}" for name in used if COSTS[name]]
    if plan.budget_bytes is not None and plan.chosen is not None:
        lines += ["", f"Budget {format_size(plan.budget_bytes)}: {chosen_text(plan.chosen)}"]
    return lines


def chosen_text(chosen: Candidate) -> str:
    """Return the choice as a sentence."""
    if not chosen.techniques:
        return "fits as given."
    return f"{', '.join(chosen.techniques)}, micro-batch {chosen.micro_batch}: {format_size(chosen.needs_bytes)}."


def nothing_fits(plan: Plan, settings: RunSettings, target: Target) -> str:
    """Return by how much nothing fits, what the smallest is, and which size of model would fit."""
    assert plan.budget_bytes is not None
    least = min(plan.candidates, key=lambda candidate: candidate.needs_bytes)
    short = format_size(least.needs_bytes - plan.budget_bytes)
    fix = f"Give {format_size(least.needs_bytes)}"
    for size in SIZES:
        smaller = _with_size(settings, size)
        if smaller is None:
            continue
        try:
            found = search(smaller, target, plan.budget_bytes)
        except UserError:
            continue
        if found.chosen is not None:
            fix += f", or a smaller model: --config configs/size/{size}.yaml fits"
            break
    else:
        fix += ", a shorter --data.max_length or a smaller model"
    return (
        f"budget: nothing fits into {format_size(plan.budget_bytes)}; the smallest, {', '.join(least.techniques)}, "
        f"needs {short} more. {fix}."
    )


def _with_size(settings: RunSettings, size: str) -> RunSettings | None:
    """Return the settings with the dimensions of `configs/size/SIZE.yaml`, None unless they are smaller."""
    _, path = find_shipped(["--config", f"configs/size/{size}.yaml"])
    dimensions = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"]["init_args"]["encoder"]
    encoder = settings.task.encoder_config
    if dimensions["num_layers"] * dimensions["hidden_size"] ** 2 >= encoder.num_layers * encoder.hidden_size**2:
        return None
    task = type(settings.task)(replace(encoder, **dimensions), settings.task.optimizer_config)
    return replace(settings, task=task)


def as_json(plan: Plan, target: Target) -> dict[str, Any]:
    """Return the machine-readable answer; bytes are the peak of live tensors unless the name says otherwise."""
    shown = plan.chosen or plan.given
    resident = {"predicted_rss_bytes": shown.needs_bytes} if target.device_type == "cpu" else {}
    return {
        "target": target.device_type,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.chosen is not None,
        "predicted_peak_bytes": shown.prediction.peak_bytes,
        "predicted_needs_bytes": shown.needs_bytes,
        **resident,
        "by_phase": shown.prediction.by_phase,
        "by_category": shown.prediction.by_category,
        "chosen": list(shown.techniques),
        "micro_batch_sequences": shown.micro_batch,
        "candidates": [
            {
                "techniques": list(candidate.techniques),
                "micro_batch_sequences": candidate.micro_batch,
                "predicted_peak_bytes": candidate.prediction.peak_bytes,
                "predicted_needs_bytes": candidate.needs_bytes,
                "added_compute": candidate.added_compute,
                "fits": plan.fits(candidate),
            }
            for candidate in plan.candidates
        ],
        "process_base_bytes": target.base_bytes,
        "parameters": shown.prediction.parameters,
        "flops_per_step": shown.prediction.flops,
    }
