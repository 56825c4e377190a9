"""What `compress` does: makes variants of a model, measures them in turns, writes the report and says which fits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tqdm import tqdm

from leanbert.api import load
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.compression.steps import QUANTIZE, Step, parse_steps, variants_of
from leanbert.compression_report.earlier import files_of, listed_files, remove_files
from leanbert.compression_report.measuring import (
    LONG,
    MANY,
    SHORT,
    autocast,
    bytes_of,
    peak_memory,
    prepared,
    time_in_turns,
)
from leanbert.compression_report.report import answer_of, as_table, folders_in_words, mark_front, write_report
from leanbert.compression_report.request import CompressRequest
from leanbert.compression_report.sensitivity import Sensitivity, examine, relative_drop
from leanbert.compression_report.variants import ORIGINAL, Source, Variant, excepting, make_references, make_variants
from leanbert.errors import UserError
from leanbert.files import explain_disk_errors
from leanbert.messages import say

LADDER = (
    ("quantize=int8",),
    ("quantize=int4",),
    ("quantize=int8_int4",),
    ("low_rank=0.99", "quantize=int8"),
    ("low_rank_embedding=0.8", "quantize=int8"),
    ("structured_pruning=0.25", "quantize=int8"),
)
"""What is tried where no steps are given: none of it trains."""

TRAINED = (
    ("blocks=0.5", "train={}", "quantize=int8"),
    ("structured_pruning=0.5", "train={}", "quantize=int8"),
    ("blocks=0.5", "structured_pruning=0.5", "train={}", "quantize=int8"),
    ("blocks=0.5", "structured_pruning=0.5", "train={}", "low_rank_embedding=0.6", "quantize=int8"),
)
"""What `search` tries besides, until one fits, with the steps of training that the configuration has."""


def run_compress(request: CompressRequest, source: Source, command: str) -> None:
    """Make the variants, measure and report them; `command` makes them again, but for the steps.

    Raises:
        UserError: Steps that cannot be, or have no effect on the model; an output that holds the model or the report
            of another program; or, after the report is written, limits that no variant keeps.

    """
    limits = request.limits()
    if request.search and source.max_steps < 1:
        raise UserError("search: trains for trainer.max_steps, which is not set. Set it")
    lists, earlier = _lists(request), listed_files(request.output, source.path)
    metrics = source.evaluate(None)
    if source.tag not in metrics:
        raise UserError(f"checkpoint.monitor: no {source.tag} is logged. Choose from {', '.join(sorted(metrics))}.")
    with explain_disk_errors(request.output, "--output"):
        request.output.mkdir(parents=True, exist_ok=True)
        others = remove_files(request.output, earlier)
        original = load(source.path)
        variants = make_references(source, original, request.output)
        variants += make_variants(request, source, original, lists, variants)
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
            found = make_variants(request, source, original, [steps], variants)
        _evaluate(found, source, metrics)
        _measure([variants[0], *found], request.seconds)
        rows += [variant.row for variant in found]
    mark_front(rows)
    answer, fits = answer_of(rows, limits, source.tag, command, request.search)
    write_report(request.output, rows, source.tag, answer, layers, files_of(request.output, rows, others))
    print(as_table(rows, source.tag))
    say(folders_in_words(rows))
    say(f"Report       {request.output / 'report.md'}, {request.output / 'pareto.png'}")
    if not fits:
        raise UserError(answer)
    say(answer)


def _lists(request: CompressRequest) -> Sequence[Sequence[Step]]:
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
    return variants_of(steps)


def _examine(
    request: CompressRequest, source: Source, variants: list[Variant], original: dict[str, float]
) -> list[Sensitivity]:
    """Return what layers cost, where it is asked or a drop is too large, and add to the variants what keeps the drop.

    Of steps that are given layers are excepted until it is kept, unless the exceptions are given too.
    """
    found = []
    most = None if request.steps is None or request.exceptions else request.limits().drop
    for variant in [*variants]:
        row = variant.row
        over = most is not None and row.drop is not None and not row.drop <= most
        if variant.quantized is None or not (over or request.sensitivity):
            continue
        judge = lambda model: source.evaluate(model, test=False)[source.tag]  # noqa: E731
        layers = examine(variant, judge, original[source.tag], source.sign, most if over else None)
        found.append(layers)
        if layers.choice is None:
            continue
        say(f"{row.name}: {layers.choice.in_words()}")
        if layers.choice.kept:
            exceptions = layers.choice.exceptions
            name = excepting(row.name, exceptions)
            path = request.output / name
            variant.quantized.write(path, exceptions)
            own = replace(row, name=name, exceptions=exceptions, size_bytes=bytes_of(path))
            variants.append(Variant(own, path, read_onnx(path)))
            _evaluate(variants[-1:], source, original)
    return found


def _evaluate(variants: Sequence[Variant], source: Source, original: dict[str, float]) -> None:
    """Give each row its metrics; the model itself, in 32 bits, has those of `original`."""
    before = original[source.tag]
    for variant in tqdm(variants, desc="Evaluating", leave=False, disable=None):
        row, alone = variant.row, variant.row.name == ORIGINAL and not variant.bf16
        with autocast(variant.bf16):
            row.metrics = original if alone else source.evaluate(variant.model)
        row.drop = relative_drop(row.metrics[source.tag], before, source.sign)


def _measure(variants: Sequence[Variant], seconds: float) -> None:
    """Give each row its times, of all in turns, and its memory, each in a process of its own."""
    progress = partial(tqdm, desc="Timing", leave=False, disable=None)

    def times(rows: int, length: int) -> list[list[float]]:
        calls = {
            str(number): prepared(variant.model, rows, length, variant.bf16) for number, variant in enumerate(variants)
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
