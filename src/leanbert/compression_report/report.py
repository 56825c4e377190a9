"""A table of variants: which of them no other beats, which keep to limits, in words and as a picture."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leanbert import strict_json
from leanbert.compression.steps import QUANTIZE
from leanbert.compression_report.measuring import LONG, MANY, SHORT
from leanbert.compression_report.request import Limits
from leanbert.compression_report.sensitivity import Sensitivity
from leanbert.files import explain_disk_errors, write_text_atomically
from leanbert.measure.counters import device_name
from leanbert.measure.figures import new_figure
from leanbert.measure.torch_compat import cpu_computes_int8
from leanbert.tasks.tables import markdown_table
from leanbert.units import MIB, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON = "report.json"


@dataclass
class Row:
    """A variant and what was measured of it; sizes in bytes, times in seconds, memory beyond that of the libraries.

    `metrics` are by tag; `drop` is the relative loss of the metric that counts on the validation set;
    `exceptions` are layers that quantization has left in 32 bits. Without
    steps it is the model itself, which stands beside the variants. `huggingface` is the folder, below the report's, of
    the model before quantization, or `no_huggingface` the reason why there is none.
    """

    name: str
    steps: list[str]
    runtime: str
    exceptions: list[str] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    drop: float | None = None
    parameters: int = 0
    nonzero: int = 0
    size_bytes: int = 0
    flops_per_token: float = 0.0
    load_peak_bytes: int = 0
    run_peak_bytes: int = 0
    latency_p50: float = 0.0
    latency_p95: float = 0.0
    rows_per_second_short: float = 0.0
    rows_per_second_long: float = 0.0
    on_front: bool = False
    huggingface: str | None = None
    no_huggingface: str | None = None

    @property
    def label(self) -> str:
        """The name, and of the model itself what computes it, for it has several rows."""
        return self.name if self.steps else f"{self.name}, {self.runtime}"

    @property
    def changes(self) -> list[str]:
        """The steps but for quantization."""
        return [step for step in self.steps if not step.startswith(f"{QUANTIZE}=")]

    def misses(self, limits: Limits) -> dict[str, float]:
        """Return the limits that it does not keep, in words, and by which factor it exceeds each."""
        found = {}
        if limits.size_bytes is not None and self.size_bytes > limits.size_bytes:
            words = f"{format_size(self.size_bytes)} of {format_size(limits.size_bytes)}"
            found[words] = self.size_bytes / limits.size_bytes
        if limits.latency_seconds is not None and self.latency_p50 > limits.latency_seconds:
            words = f"{self.latency_p50 * 1e3:.1f} of {limits.latency_seconds * 1e3:g} ms"
            found[words] = self.latency_p50 / limits.latency_seconds
        if limits.drop is not None and self.drop is not None and self.drop > limits.drop:
            found[f"a drop of {self.drop:.1%} of {limits.drop:.1%}"] = self.drop / max(limits.drop, 1e-6)
        return found


def mark_front(rows: Sequence[Row]) -> None:
    """Mark the rows that no other beats: in size, latency and drop at least as good, and better in one (Pareto)."""
    for row in rows:
        mine = _costs(row)
        row.on_front = not any(
            all(a <= b for a, b in zip(_costs(other), mine, strict=True)) and _costs(other) != mine for other in rows
        )


def _costs(row: Row) -> tuple[float, float, float]:
    return row.size_bytes, row.latency_p50, row.drop or 0.0


def answer_of(rows: Sequence[Row], limits: Limits, tag: str, command: str, searched: bool) -> tuple[str, bool]:
    """Return in words which variant to take, and whether it keeps the limits; `searched`: smaller ones were trained."""
    if not limits.any:
        names = ", ".join(dict.fromkeys(row.name for row in rows if row.on_front))
        return f"No other variant beats {names}. Give --max_size, --max_latency or --max_drop to choose", True
    fitting = [row for row in rows if not row.misses(limits)]
    if not fitting:
        nearest = min(rows, key=lambda row: max(row.misses(limits).values()))
        missed = " and ".join(nearest.misses(limits))
        more = "train longer (trainer.max_steps)"
        if not searched:
            more = "let smaller ones be trained by distillation: --search true"
        words = f"compress: no variant keeps the limits. The nearest, {nearest.label}, has {missed}."
        return f"{words} Raise a limit, or {more}", False
    best = min(fitting, key=lambda row: row.latency_p50)
    drop = "" if best.drop is None else f", {tag} {0.0 - best.drop:+.2%}"
    again = f" Made again by: {command} --steps {shlex.quote(json.dumps(best.steps))}" if best.steps else ""
    if best.exceptions:
        again += f" --exceptions {shlex.quote(json.dumps(best.exceptions))}"
    milliseconds = 1e3 * best.latency_p50
    return f"Take {best.label}: {format_size(best.size_bytes)}, {milliseconds:.2f} ms a row{drop}.{again}", True


def as_table(rows: Sequence[Row], tag: str) -> str:
    """Return the rows as Markdown, with the metric `tag`; those on the front have a star."""
    test = "test/" + tag.removeprefix("val/")
    header = [
        "variant", "computed by", tag, "change", *([test] if _has(rows, test) else []), "parameters", "not zero",
        "file", "load", "run", "MFLOP a token", "1 row p50", "p95", "32 short rows", "32 long rows",
    ]  # fmt: skip
    lines = []
    for row in rows:
        change = "" if row.drop is None else f"{0.0 - row.drop:+.2%}"  # 0.0 has no sign so
        lines.append([
            f"{row.name}{' *' if row.on_front else ''}", row.runtime, _number(row.metrics.get(tag)), change,
            *([_number(row.metrics.get(test))] if _has(rows, test) else []), f"{row.parameters:,}", f"{row.nonzero:,}",
            format_size(row.size_bytes),
            *(format_size(size) if size else "" for size in (row.load_peak_bytes, row.run_peak_bytes)),
            f"{row.flops_per_token / 1e6:,.2f}", f"{row.latency_p50 * 1e3:,.2f} ms", f"{row.latency_p95 * 1e3:,.2f} ms",
            f"{row.rows_per_second_short:,.0f}/s", f"{row.rows_per_second_long:,.0f}/s",
        ])  # fmt: skip
    return markdown_table(header, lines)


def folders_in_words(rows: Sequence[Row]) -> str:
    """Return a line with the Hugging Face folders, and one for each reason why models have none."""
    folders = list(dict.fromkeys(row.huggingface for row in rows if row.huggingface is not None))
    lines = [f"Hugging Face folders of models before quantization: {', '.join(folders)}"] if folders else []
    first = {tuple(row.changes): row for row in reversed(rows)}
    lacking: dict[str, list[str]] = {}
    for row in reversed(first.values()):
        if row.no_huggingface is not None:
            lacking.setdefault(row.no_huggingface, []).append(row.name)
    return "\n".join([*lines, *(f"None of {', '.join(names)}: {reason}" for reason, names in lacking.items())])


def as_json(rows: Sequence[Row], tag: str, machine: str, answer: str) -> dict[str, Any]:
    """Return the same for programs."""
    return {"metric": tag, "machine": machine, "answer": answer, "variants": [asdict(row) for row in rows]}


def pareto_figure(rows: Sequence[Row], tag: str) -> Figure:
    """Return the metric over size and over latency, with the variants that no other beats in colour."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = new_figure(
        f"{tag} of each variant; coloured: no other is at least as good in all three", columns=2
    )
    shown = [row for row in rows if tag in row.metrics]
    for axes, label, values in (
        (left, "file (MiB)", [row.size_bytes / MIB for row in shown]),
        (right, "one row of 32 tokens (ms, median)", [row.latency_p50 * 1e3 for row in shown]),
    ):
        for number, (row, x) in enumerate(zip(shown, values, strict=True)):
            y = row.metrics[tag]
            (point,) = axes.plot(x, y, "o" if row.on_front else "x", color="#D55E00" if row.on_front else "#777777")
            offset = ((0, 11), (0, -11), (11, 0), (-11, 0))[number % 4]  # neighbours are often at the same point
            axes.annotate(str(number + 1), (x, y), offset, textcoords="offset points", ha="center", va="center")
            if axes is left:
                point.set_label(f"{number + 1}  {row.label}")
        axes.set(xlabel=label, ylabel=tag, xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.1)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def write_report(
    output: Path, rows: Sequence[Row], tag: str, answer: str, layers: Sequence[Sensitivity], files: Sequence[str]
) -> None:
    """Write report.md, report.json, in which the variants' `files` are, pareto.png and TensorBoard's events."""
    from torch.utils.tensorboard import SummaryWriter

    processor = device_name(torch.device("cpu"))
    machine = f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = as_table(rows, tag)
    slow = "" if cpu_computes_int8() else " int8 is no faster on a processor without VNNI, as here."
    note = (
        f"{answer}\n\n* no other row is at least as good in file size, p50 and metric, and better in one. The one "
        f"row and short rows have {SHORT} tokens, long ones {LONG}, as far as the model has positions. load and run: "
        f"resident memory of a new process beyond the libraries', to load and to compute {MANY} long rows besides. "
        f"Measured in turns on {machine}.{slow}\n\n" + folders_in_words(rows).replace("\n", "\n\n")
    )
    sections = "".join(f"\n\n{each.in_words(tag)}" for each in layers)
    text = f"# Variants\n\n{table}\n\n{note}\n\n![Pareto front](pareto.png){sections}\n"
    write_text_atomically(output / "report.md", text)
    more = {"sensitivity": [asdict(each) for each in layers], "files": files}
    strict_json.write(output / JSON, as_json(rows, tag, machine, answer) | more)
    figure = pareto_figure(rows, tag)
    with explain_disk_errors(output, "--output"):
        building = output / ".pareto.png"
        figure.savefig(building, format="png")
        os.replace(building, output / "pareto.png")
        with SummaryWriter(output / "tensorboard") as writer:
            writer.add_text("compression/report", f"{table}\n\n{note}")
            for each in layers:
                writer.add_text(f"compression/sensitivity/{each.variant}", each.in_words(tag))
            writer.add_figure("compression/pareto", figure, close=False)


def _has(rows: Sequence[Row], tag: str) -> bool:
    return any(tag in row.metrics for row in rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
