"""What `compress` does: makes variants of a model, measures them in turns, writes the report and says which fits."""

from __future__ import annotations

import copy
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from tqdm import tqdm

from leanbert.api import Pretrained, load
from leanbert.compression.onnx.quantization import STATIC, Scheme, quantize_plainly
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.compression.steps import (
    PRUNING,
    QUANTIZE,
    Calibrate,
    Step,
    apply_steps,
    inputs_seen,
    parse_steps,
    reported,
    split_at_training,
)
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
from leanbert.compression_report.report import Row, answer_of, as_table, mark_front, write_report
from leanbert.compression_report.request import CompressRequest
from leanbert.compression_report.sensitivity import Sensitivity, examine, relative_drop
from leanbert.errors import UserError
from leanbert.files import explain_disk_errors
from leanbert.memory.precision import default_precision
from leanbert.messages import say
from leanbert.models.base import EncoderModel
from leanbert.models.packed_inputs import PackedInputs

LADDER = (
    ("quantize=int8",),
    ("quantize=int4",),
    ("quantize=int8_int4",),
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


class Evaluate(Protocol):
    """Judges models as the run that is set does."""

    def __call__(self, model: nn.Module | None, test: bool = True) -> dict[str, float]:
        """Return the metrics by tag, on validation and, if asked and given, test data; None: of what is compressed."""


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
    whole: Pretrained | None = None  # what was quantized, and how
    scheme: Scheme | None = None
    seen: Sequence[PackedInputs] = ()  # of real data, where that counts


def run_compress(request: CompressRequest, source: Source, command: str) -> None:
    """Make the variants, measure and report them; `command` makes them again, but for the steps.

    Raises:
        UserError: Steps that cannot be, or have no effect on the model; or, after the report is written, limits that no
            variant keeps.

    """
    limits = request.limits()
    if request.search and source.max_steps < 1:
        raise UserError("search: trains for trainer.max_steps, which is not set. Set it")
    lists = _lists(request)
    metrics = source.evaluate(None)
    if source.tag not in metrics:
        raise UserError(f"checkpoint.monitor: no {source.tag} is logged. Choose from {', '.join(sorted(metrics))}.")
    with explain_disk_errors(request.output, "--output"):
        request.output.mkdir(parents=True, exist_ok=True)
        original = load(source.path)
        variants = [*_references(source, original, request.output), *_make(request, source, original, lists)]
    _evaluate(variants, source, metrics)
    with explain_disk_errors(request.output, "--output"):
        layers = _examine(request, source, variants, metrics)
    _measure(variants, request.seconds)
    rows = [variant.row for variant in variants]
    for texts in TRAINED if request.search else ():
        if limits.any and any(row.steps and not row.misses(limits) for row in rows):
            break
        steps = parse_steps([text.format(source.max_steps) for text in texts])
        with explain_disk_errors(request.output, "--output"):
            found = _make(request, source, original, [steps])
        _evaluate(found, source, metrics)
        _measure([variants[0], *found], request.seconds)
        rows += [variant.row for variant in found]
    mark_front(rows)
    answer, fits = answer_of(rows, limits, source.tag, command)
    write_report(request.output, rows, source.tag, answer, layers)
    print(as_table(rows, source.tag))
    say(f"Report       {request.output / 'report.md'}, {request.output / 'pareto.png'}")
    if not fits:
        raise UserError(answer)
    say(answer)


def _lists(request: CompressRequest) -> list[list[Step]]:
    """Return the lists of steps that make a variant each."""
    if request.exceptions and request.steps is None:
        raise UserError("exceptions: of which steps? Give --steps too, such as '[\"quantize=int8\"]'")
    if request.steps is None:
        return [parse_steps(texts) for texts in LADDER]
    steps = parse_steps(request.steps)
    if not steps:
        raise UserError("steps: none is given. Give some, or leave them out to have several tried")
    for option in ("exceptions", "sensitivity"):
        if getattr(request, option) and steps[-1].name != QUANTIZE:
            raise UserError(f"{option}: no step quantizes. Add {QUANTIZE}=int8 or {QUANTIZE}=int4 to the steps")
    return reported(steps)


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
            seen = inputs_seen(model, source.calibrate) if scheme == STATIC else []
        except UserError as error:
            if request.steps is not None:
                raise
            say(f"Left out {name}: {error}")
            continue
        if (decoder := getattr(model, "decoder", None)) is not None:
            smaller.metadata = replace(smaller.metadata, decoder_layers=len(decoder.blocks))
        exceptions = [] if scheme is None else list(request.exceptions or [])
        name = _excepting(name, exceptions)
        path = request.output / name
        sparse = scheme is None and any(step.name == PRUNING for step in steps)
        smaller.export(path, "sparse" if sparse else "onnx", scheme, exceptions, seen)
        row = Row(name, [str(step) for step in steps], "PyTorch float32" if sparse else "onnxruntime", exceptions)
        row.size_bytes = bytes_of(path)
        row.parameters, row.nonzero = weights_of(model)
        row.flops_per_token = flops_per_token(model)
        computed = model if sparse else read_onnx(path)
        found.append(_Variant(row, path, computed, whole=smaller if scheme else None, scheme=scheme, seen=seen))
    return found


def _excepting(name: str, exceptions: Sequence[str]) -> str:
    """Return the name of a variant some of whose layers stay in 32 bits."""
    return f"{name}-except-{len(exceptions)}" if exceptions else name


def _examine(
    request: CompressRequest, source: Source, variants: list[_Variant], original: dict[str, float]
) -> list[Sensitivity]:
    """Return what layers cost, where it is asked or a drop is too large, and add to the variants what keeps the drop.

    Of steps that are given layers are excepted until it is kept, unless the exceptions are given too.
    """
    found = []
    most = None if request.steps is None or request.exceptions else request.limits().drop
    for variant in [*variants]:
        row, whole, scheme = variant.row, variant.whole, variant.scheme
        over = most is not None and row.drop is not None and not row.drop <= most
        if whole is None or scheme is None or not (over or request.sensitivity):
            continue
        layers = examine(
            row.name, whole, scheme, row.exceptions, variant.seen,
            lambda model: source.evaluate(model, test=False)[source.tag],
            original[source.tag], source.sign, most if over else None,
        )  # fmt: skip
        found.append(layers)
        if layers.choice is None:
            continue
        say(f"{row.name}: {layers.choice.in_words()}")
        if layers.choice.kept:
            exceptions = layers.choice.exceptions
            name = _excepting(row.name, exceptions)
            path = request.output / name
            whole.export(path, "onnx", scheme, exceptions, variant.seen)
            own = replace(row, name=name, exceptions=exceptions, size_bytes=bytes_of(path))
            variants.append(_Variant(own, path, read_onnx(path)))
            _evaluate(variants[-1:], source, original)
    return found


def _evaluate(variants: Sequence[_Variant], source: Source, original: dict[str, float]) -> None:
    """Give each row its metrics; the model itself has those of `original`, and in 16 bits it is not evaluated."""
    before = original[source.tag]
    for variant in tqdm(variants, desc="Evaluating", leave=False, disable=None):
        if not variant.bf16:
            row, alone = variant.row, variant.row.name == ORIGINAL
            row.metrics = original if alone else source.evaluate(variant.model)
            row.drop = relative_drop(row.metrics[source.tag], before, source.sign)


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
