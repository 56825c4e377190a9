"""What `compress` does: makes variants of a model, measures them in turns, writes the report and says which fits."""

from __future__ import annotations

import copy
import json
import os
import platform
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from leanbert import strict_json
from leanbert.api import Pretrained, load
from leanbert.compression.onnx.quantization import quantize_plainly
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.compression.steps import PRUNING, Calibrate, Step, apply_steps, parse_steps, split_at_training
from leanbert.compression_report.measuring import (
    LONG,
    MANY,
    SHORT,
    bytes_of,
    flops_per_token,
    peak_memory,
    run,
    time_in_turns,
    weights_of,
)
from leanbert.compression_report.report import Row, as_json, as_table, mark_front, pareto_figure
from leanbert.compression_report.request import CompressRequest, Limits
from leanbert.errors import UserError
from leanbert.files import explain_disk_errors, write_text_atomically
from leanbert.measure.torch_compat import cpu_computes_int8
from leanbert.memory.precision import default_precision
from leanbert.messages import say
from leanbert.models.base import EncoderModel
from leanbert.units import format_size

LADDER = (
    ("quantize=int8",),
    ("quantize=int4",),
    ("low_rank=0.99", "quantize=int8"),
    ("structured_pruning=0.25", "quantize=int8"),
)
"""What is tried where no steps are given: none of it trains."""

TRAINED = (
    ("blocks=0.5", "train={}", "quantize=int8"),
    ("structured_pruning=0.5", "train={}", "quantize=int8"),
    ("blocks=0.5", "structured_pruning=0.5", "train={}", "quantize=int8"),
)
"""What `search` tries besides, until one fits, with the steps of training that the configuration has."""

TRAINING = "training"
"""Folder of the runs of variants that are trained."""

ORIGINAL, ONNX, PLAIN = "original", "onnx", "onnxruntime-int8"
"""Names of what stands beside the variants: the model itself, the same in an ONNX file, and that file quantized as
onnxruntime does where nothing is set."""

Evaluate = Callable[[nn.Module | None], dict[str, float]]
"""Returns the metrics of a model by tag, on the validation set and, if there is one, the test set; None: of the model
that is compressed."""


Train = Callable[[Sequence[Step], int, Path], Path]
"""Trains the model with steps applied to it, for so many optimizer steps, and returns the file of what came out; runs
are kept in a folder."""


@dataclass(frozen=True)
class Source:
    """The model to compress: the file or folder, and how the run that is set judges and trains models.

    `tag` is the metric that counts, of which more is better where `sign` is -1, and less where it is 1. `max_steps` are
    those of the run.
    """

    path: Path
    evaluate: Evaluate
    calibrate: Calibrate
    train: Train
    tag: str
    sign: float
    max_steps: int


@dataclass
class _Variant:
    row: Row
    path: Path
    model: Any
    bf16: bool = False


def run_compress(request: CompressRequest, source: Source, command: str) -> None:
    """Make the variants, measure and report them; `command` makes them again, but for the steps.

    Raises:
        UserError: Steps that cannot be, or have no effect on the model; or, after the report is written, limits that no
            variant keeps.

    """
    limits = request.limits()
    if request.search and source.max_steps < 1:
        raise UserError("search: trains for trainer.max_steps, which is not set. Set it")
    lists = _lists(request.steps)
    metrics = source.evaluate(None)
    if source.tag not in metrics:
        raise UserError(f"checkpoint.monitor: no {source.tag} is logged. Choose from {', '.join(sorted(metrics))}.")
    with explain_disk_errors(request.output, "--output"):
        request.output.mkdir(parents=True, exist_ok=True)
        original = load(source.path)
        variants = [*_references(source, original, request.output), *_make(request, source, original, lists)]
    _evaluate(variants, source, metrics)
    _measure(variants, request.seconds)
    rows = [variant.row for variant in variants]
    answer, fits = answer_of(rows, limits, source.tag, command)
    for texts in TRAINED if request.search else ():
        if fits and limits.any:
            break
        steps = parse_steps([text.format(source.max_steps) for text in texts])
        found = _make(request, source, original, [steps])
        _evaluate(found, source, metrics)
        _measure([variants[0], *found], request.seconds)
        rows += [variant.row for variant in found]
        answer, fits = answer_of(rows, limits, source.tag, command)
    mark_front(rows)
    answer, fits = answer_of(rows, limits, source.tag, command)
    _write(request.output, rows, source.tag, answer)
    print(as_table(rows, source.tag))
    say(f"Report       {request.output / 'report.md'}, {request.output / 'pareto.png'}")
    if not fits:
        raise UserError(answer)
    say(answer)


def _lists(given: Sequence[str] | None) -> list[list[Step]]:
    """Return the lists of steps that make a variant each."""
    if given is None:
        return [parse_steps(texts) for texts in LADDER]
    steps = parse_steps(given)
    if not steps:
        raise UserError("steps: none is given. Give some, or leave them out to have several tried")
    return [steps[: count + 1] for count in range(len(steps))]


def _references(source: Source, original: Pretrained, output: Path) -> list[_Variant]:
    """Return the model itself, in 32 bits and where the CPU has them 16, its ONNX file and that plainly quantized."""
    parameters, nonzero = weights_of(original.model)
    row = Row(ORIGINAL, [], "PyTorch float32", parameters=parameters, nonzero=nonzero)
    row.flops_per_token = flops_per_token(original.model)
    try:
        original.export(output / ORIGINAL)
        row.size_bytes = bytes_of(output / ORIGINAL)
    except UserError:  # no class of transformers is like it
        row.size_bytes = sum(parameter.nbytes for parameter in original.model.parameters())
    found = [_Variant(row, source.path, original.model)]
    if default_precision("cpu") == "bf16-mixed":
        found.append(_Variant(replace(row, runtime="PyTorch bfloat16"), source.path, original.model, bf16=True))
    original.export(output / ONNX, "onnx")
    shutil.copytree(output / ONNX, output / PLAIN, dirs_exist_ok=True)
    for file in (output / ONNX).glob("*.onnx"):
        quantize_plainly(file, output / PLAIN / file.name)
    for name in (ONNX, PLAIN):
        path = output / name
        own = replace(row, name=name, runtime="onnxruntime", size_bytes=bytes_of(path))
        found.append(_Variant(own, path, read_onnx(path)))
    return found


def _make(request: CompressRequest, source: Source, original: Pretrained, lists: list[list[Step]]) -> list[_Variant]:
    """Write the folder of each list of steps. Raises `UserError` for a given step that has no effect."""
    found = []
    trained: dict[str, EncoderModel] = {}  # lists that begin alike share it
    for steps in tqdm(lists, desc="Variants", leave=False, disable=None):
        smaller, name = copy.copy(original), "+".join(step.slug for step in steps)
        cuts, count, rest = split_at_training(steps)
        try:
            if count and (key := f"{list(map(str, cuts))} {count}") not in trained:
                trained[key] = load(source.train(cuts, count, request.output / TRAINING)).model
            model = smaller.model = copy.deepcopy(trained[key] if count else original.model)
            scheme = apply_steps(model, rest, source.calibrate)
        except UserError as error:
            if request.steps is not None:
                raise
            say(f"Left out {name}: {error}")
            continue
        if (decoder := getattr(model, "decoder", None)) is not None:
            smaller.metadata = replace(smaller.metadata, decoder_layers=len(decoder.blocks))
        path = request.output / name
        sparse = scheme is None and any(step.name == PRUNING for step in steps)
        smaller.export(path, "sparse" if sparse else "onnx", scheme)
        row = Row(name, [str(step) for step in steps], "PyTorch float32" if sparse else "onnxruntime")
        row.size_bytes = bytes_of(path)
        row.parameters, row.nonzero = weights_of(model)
        row.flops_per_token = flops_per_token(model)
        found.append(_Variant(row, path, model if sparse else read_onnx(path)))
    return found


def _evaluate(variants: Sequence[_Variant], source: Source, original: dict[str, float]) -> None:
    """Give each row its metrics; the model itself has those of `original`, and in 16 bits it is not evaluated."""
    before = original[source.tag]
    for variant in tqdm(variants, desc="Evaluating", leave=False, disable=None):
        if not variant.bf16:
            row, alone = variant.row, variant.row.name == ORIGINAL
            row.metrics = original if alone else source.evaluate(variant.model)
            row.drop = source.sign * (row.metrics[source.tag] - before) / abs(before) if before else 0.0


def _measure(variants: Sequence[_Variant], seconds: float) -> None:
    """Give each row its times, of all in turns, and its memory, each in a process of its own."""
    progress = partial(tqdm, desc="Timing", leave=False, disable=None)

    def times(rows: int, length: int) -> list[list[float]]:
        calls = {
            str(number): partial(run, variant.model, rows, length, variant.bf16)
            for number, variant in enumerate(variants)
        }
        return list(time_in_turns(calls, seconds / 3, progress).values())

    one, short, long = times(1, SHORT), times(MANY, SHORT), times(MANY, LONG)
    for variant, alone, few, many in zip(variants, one, short, long, strict=True):
        row = variant.row
        row.latency_p50 = statistics.median(alone)
        row.latency_p95 = statistics.quantiles(alone, n=20)[-1]
        row.rows_per_second_short, row.rows_per_second_long = (MANY / statistics.median(each) for each in (few, many))
    for variant in tqdm(variants, desc="Memory", leave=False, disable=None):
        if not variant.bf16:
            variant.row.load_peak_bytes, variant.row.run_peak_bytes = peak_memory(variant.path)


def answer_of(rows: Sequence[Row], limits: Limits, tag: str, command: str) -> tuple[str, bool]:
    """Return in words which variant to take, and whether it keeps the limits."""
    variants = [row for row in rows if row.steps]
    if not limits.any:
        names = ", ".join(row.name for row in variants if row.on_front) or "the model itself"
        return f"No other variant beats {names}. Give --max_size, --max_latency or --max_drop to choose", True
    fitting = [row for row in variants if not row.misses(limits)]
    if not fitting:
        nearest = min(variants, key=lambda row: row.excess(limits))
        missed = " and ".join(nearest.misses(limits))
        return (
            f"compress: no variant keeps the limits. The nearest, {nearest.name}, has {missed}. "
            "Raise a limit, or let smaller ones be trained by distillation: --search true"
        ), False
    best = min(fitting, key=lambda row: row.latency_p50)
    drop = "" if best.drop is None else f", {tag} {-best.drop:+.2%}"
    again = f"{command} --steps {shlex.quote(json.dumps(best.steps))}"
    return (
        f"Take {best.name}: {format_size(best.size_bytes)}, {best.latency_p50 * 1e3:.2f} ms a row{drop}. "
        f"Made again by: {again}"
    ), True


def _write(output: Path, rows: Sequence[Row], tag: str, answer: str) -> None:
    """Write report.md, report.json, pareto.png and TensorBoard's events."""
    from torch.utils.tensorboard import SummaryWriter

    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    table = as_table(rows, tag)
    slow = "" if cpu_computes_int8() else " int8 is no faster on a processor without VNNI, as here."
    note = (
        f"{answer}\n\n* no other row is at least as good in file size, p50 and metric, and better in one. The one "
        f"row and short rows have {SHORT} tokens, long ones {LONG}, as far as the model has positions. load and run: "
        f"resident memory of a new process beyond the libraries', to load and to compute {MANY} long rows besides. "
        f"Measured in turns on {machine}.{slow}"
    )
    write_text_atomically(output / "report.md", f"# Variants\n\n{table}\n\n{note}\n\n![Pareto front](pareto.png)\n")
    write_text_atomically(
        output / "report.json", strict_json.dumps(as_json(rows, tag, machine, answer), indent=2) + "\n"
    )
    figure = pareto_figure(rows, tag)
    with explain_disk_errors(output, "--output"):
        building = output / ".pareto.png"
        figure.savefig(building, format="png")
        os.replace(building, output / "pareto.png")
        with SummaryWriter(output / "tensorboard") as writer:
            writer.add_text("compression/report", f"{table}\n\n{note}")
            writer.add_figure("compression/pareto", figure, close=False)
