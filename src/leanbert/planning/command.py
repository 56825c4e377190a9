"""The `plan` command: what a configuration needs, and which techniques fit it into a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import psutil
import torch
import yaml
from tqdm import tqdm

from leanbert import strict_json
from leanbert.errors import UserError
from leanbert.files import write_text_atomically
from leanbert.measure.timeline import CATEGORIES
from leanbert.planning.device import DeviceType, Target
from leanbert.planning.distributed import describe_sharing, share_out, sharing_json
from leanbert.planning.figures import sweep_figure
from leanbert.planning.overlays import SHARDED, apply
from leanbert.planning.profile import Profile
from leanbert.planning.request import PlanRequest
from leanbert.planning.run_settings import RunSettings
from leanbert.planning.search import Plan, search
from leanbert.planning.sweep import SIZES, Cell, parse_sweep, sweep, with_size
from leanbert.planning.timing import RunLength, estimator, measure
from leanbert.settings import device_type as device_type_of
from leanbert.tasks.techniques import TECHNIQUES
from leanbert.units import MIB, format_duration, format_size, parse_size

MARGIN = 0.1
"""Fraction of what the device has free that `--budget auto` leaves to others."""

progress = partial(tqdm, desc="Planning", leave=False, disable=None)
"""Shows on a terminal what is worked through."""


def run_plan(
    settings: RunSettings,
    target: Target,
    request: PlanRequest,
    length: Callable[[], RunLength] | None = None,
    profile: Profile | None = None,
) -> Plan:
    """Print the plan, and write what was asked for; with a `profile` time is estimated by it.

    Raises UserError if nothing fits the budget, after the JSON is written, or for a budget that is no size.
    """
    started = time.time() - psutil.Process().create_time()
    device_type, here = target.device_type, device_type_of("auto")
    budget = budget_bytes(request.budget, device_type)
    estimate = None
    if request.device is not None:
        estimate = estimator(request.device, request.share, profile, str(settings.precision))
    if length is not None and device_type != here:
        raise UserError(f"measure: times this machine's {here}, not {device_type}. Give --device for an estimate.")
    plan = search(settings, target, budget, progress, first=request.first)
    print("\n".join(describe(plan, target)))
    answer = as_json(plan, target)
    if shared := share_out(apply(settings, (plan.chosen or plan.given).overlay)):
        print("\n".join(describe_sharing(shared, settings.devices)))
        answer |= sharing_json(shared, settings.devices)
    shown, tokens = plan.chosen or plan.given, settings.rows_per_step * settings.data.hparams["max_length"]
    if settings.vocab_size is None:
        vocabulary = f"{settings.data.hparams['vocab_size']:,} tokens, as data.vocab_size says"
        print(f"\nVocabulary   {vocabulary}. A small corpus yields fewer: --prepare counts them.")
    print(f"\nA step       {shown.prediction.flops / 1e12:,.3f} TFLOP, {tokens:,} tokens on each device")
    if length is not None:
        answer["time"] = foretell(apply(settings, shown.overlay), length(), started)
        print("Time, measured here: " + describe_time(answer["time"]))
    if estimate is not None:
        seconds = estimate(shown.prediction.flops)
        share = {} if profile is not None else {"share_of_peak": request.share}
        answer["estimate"] = {"device": request.device, **share, "seconds_per_step": seconds}
        how = f"{request.device} at {100 * request.share:.0f} % of its peak" if profile is None else profile.device
        print(f"Time, estimated for {how}: {seconds:.3g} s a step, {tokens / seconds:,.0f} tokens/s")
    if request.json is not None:
        strict_json.write(request.json, answer)
    if plan.chosen is None:
        raise UserError(nothing_fits(plan, settings, target))
    if request.save is not None:
        overlay = yaml.safe_dump(plan.chosen.overlay, sort_keys=False) if plan.chosen.overlay else "{}\n"
        write_text_atomically(request.save, f"# {', '.join(plan.chosen.techniques) or 'nothing to add'}\n{overlay}")
    return plan


def foretell(settings: RunSettings, length: RunLength, start_seconds: float) -> dict[str, float]:
    """Return how long the run will take from steps timed here, in seconds, of which it starts for `start_seconds`."""
    times = measure(settings)
    tokens = settings.rows_per_step * settings.devices * settings.data.hparams["max_length"]
    return {
        **asdict(length),
        "tokens": length.steps * tokens,
        "seconds_per_step": times.step,
        "seconds_per_validation_batch": times.validation_batch,
        "start_seconds": start_seconds,
        "teacher_seconds": length.training_rows * times.teacher_row,
        "seconds": start_seconds + length.seconds(times),
    }


def describe_time(time: Mapping[str, float]) -> str:
    """Return what `foretell` found as a sentence."""
    teacher = f"teacher {time['teacher_seconds']:.3g} s, " if time["teacher_seconds"] else ""
    return (
        f"{teacher}{time['steps']:,} steps of {time['seconds_per_step']:.3g} s, {time['validations']} validations of "
        f"{time['batches_per_validation']} x {time['seconds_per_validation_batch']:.3g} s, start "
        f"{time['start_seconds']:.0f} s: about {format_duration(time['seconds'])}, {time['tokens']:,} tokens"
    )


def run_sweep(settings: RunSettings, target: Target, request: PlanRequest) -> list[Cell]:
    """Print the largest micro-batches that fit, by model size and sequence length, and write what was asked for.

    Raises UserError without a budget, or for axes that are unknown.
    """
    budget = budget_bytes(request.budget, target.device_type)
    if budget is None:
        raise UserError("sweep: into which budget? Give --budget 8GiB, or --budget auto.")
    sizes, lengths = parse_sweep(request.sweep or [], settings)
    cells = sweep(settings, target, budget, sizes, lengths, progress)
    print(f"Largest micro-batch (sequences) that fits into {format_size(budget)} on {target.device_type}")
    print(f"{'':<8}" + "".join(f"{length:>10,}" for length in lengths) + "  tokens a sequence")
    for size in sizes:
        row = [cell for cell in cells if cell.size == size]
        print(f"{size:<8}" + "".join(f"{cell.micro_batch or '-':>10}" for cell in row))
    if request.json is not None:
        strict_json.write(request.json, sweep_json(cells, target, budget))
    if request.figure is not None:
        request.figure.parent.mkdir(parents=True, exist_ok=True)
        sweep_figure(cells, f"Largest micro-batch in {format_size(budget)}").savefig(request.figure, dpi=120)
    return cells


def sweep_json(cells: list[Cell], target: Target, budget: int) -> dict[str, Any]:
    """Return the grid for programs; `micro_batch_sequences` is 0 where a single sequence does not fit."""
    return {
        "target": target.device_type,
        "budget_bytes": budget,
        "cells": [
            {
                "size": cell.size,
                "max_length": cell.max_length,
                "micro_batch_sequences": cell.micro_batch,
                "predicted_peak_bytes": cell.prediction.peak_bytes,
                "predicted_needs_bytes": cell.needs_bytes,
                "parameters": cell.prediction.parameters,
            }
            for cell in cells
        ],
    }


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
    used = {name for candidate in plan.candidates for name in candidate.techniques}
    lines += ["", "What they cost"] if used else [""]
    if SHARDED in used:
        lines.append(f"  {SHARDED:<24}half as much again is sent as with ddp")
    lines += [f"  {technique.name:<24}{technique.costs}" for technique in TECHNIQUES if technique.name in used]
    if plan.budget_bytes is not None and (chosen := plan.chosen) is not None:
        names = ", ".join(chosen.techniques)
        choice = f"{names}, micro-batch {chosen.micro_batch}: {format_size(chosen.needs_bytes)}."
        lines += ["", f"Budget {format_size(plan.budget_bytes)}: {choice if names else 'fits as given.'}"]
    return lines


def nothing_fits(plan: Plan, settings: RunSettings, target: Target) -> str:
    """Return by how much nothing fits, what the smallest is, and which size of model would fit."""
    assert plan.budget_bytes is not None
    least = min(plan.candidates, key=lambda candidate: candidate.needs_bytes)
    short = format_size(least.needs_bytes - plan.budget_bytes)
    fix = f"Give {format_size(least.needs_bytes)}"
    for size in _smaller_sizes(settings):
        try:
            found = search(with_size(settings, size), target, plan.budget_bytes, first=True)
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


def _smaller_sizes(settings: RunSettings) -> list[str]:
    """Return the shipped sizes that are smaller than the model, the largest first."""

    def volume(run: RunSettings) -> int:
        encoder = run.task.encoder_config
        return int(encoder.num_layers * encoder.hidden_size**2)

    return [size for size in reversed(SIZES) if volume(with_size(settings, size)) < volume(settings)]


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
                "overlay": candidate.overlay,
            }
            for candidate in plan.candidates
        ],
        "process_base_bytes": target.base_bytes,
        "parameters": shown.prediction.parameters,
        "flops_per_step": shown.prediction.flops,
    }
