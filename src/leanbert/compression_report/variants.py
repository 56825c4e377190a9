"""Variants of a trained model: each made by its steps and written to a folder, beside the model itself."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from tqdm import tqdm

from leanbert.api import Pretrained, load
from leanbert.compression.onnx.quantization import STATIC, Scheme, Seen, quantize_plainly
from leanbert.compression.onnx.runtime import read_onnx
from leanbert.compression.steps import QUANTIZE, ZEROS, Calibrate, Step, apply_steps, inputs_seen, split_at_training
from leanbert.compression_report.measuring import bytes_of, flops_per_token, weights_of
from leanbert.compression_report.report import Row
from leanbert.compression_report.request import CompressRequest
from leanbert.errors import UserError
from leanbert.exporting import write_folder
from leanbert.memory.precision import default_precision
from leanbert.messages import say
from leanbert.models.base import EncoderModel

TRAINING, HUGGINGFACE = "training", "hf"
"""Folders of the runs of variants that are trained, and, below that of a variant, of `transformers`."""

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


@dataclass(frozen=True)
class Quantized:
    """How a model is quantized.

    Args:
        whole: The model before.
        scheme: What is done to it.
        seen: What it has read of real data, where that counts.
        float32: A folder with its ONNX files in 32 bits; None: they are made.

    """

    whole: Pretrained
    scheme: Scheme
    seen: Sequence[Seen]
    float32: Path | None

    def write(self, folder: Path, exceptions: Sequence[str]) -> None:
        """Write the model with all but some layers quantized."""
        write_folder(self.whole, folder, "onnx", self.scheme, exceptions, self.seen, self.float32)


@dataclass
class Variant:
    """A model to measure, and its row of the report; `quantized`: how it came to be, if it is."""

    row: Row
    path: Path
    model: Any
    bf16: bool = False
    quantized: Quantized | None = None


def make_references(source: Source, original: Pretrained, output: Path) -> list[Variant]:
    """Return the model itself, in 32 bits and where the CPU has them 16, its ONNX file and that plainly quantized."""
    parameters, nonzero = weights_of(original.model)
    row = Row(ORIGINAL, [], "PyTorch float32", parameters=parameters, nonzero=nonzero)
    row.flops_per_token = flops_per_token(original.model)
    leave_huggingface(original, row, output, ORIGINAL)
    if row.huggingface is not None:
        row.size_bytes = bytes_of(output / ORIGINAL)
    else:
        row.size_bytes = sum(parameter.nbytes for parameter in original.model.parameters())
    found = [Variant(row, source.path, original.model)]
    if default_precision("cpu") == "bf16-mixed":
        found.append(Variant(replace(row, runtime="PyTorch bfloat16"), source.path, original.model, bf16=True))
    original.export(output / ONNX, "onnx")
    shutil.copytree(output / ONNX, output / PLAIN, dirs_exist_ok=True)
    for file in (output / ONNX).glob("*.onnx"):
        quantize_plainly(file, output / PLAIN / file.name)
    for name in (ONNX, PLAIN):
        path = output / name
        own = replace(row, name=name, runtime="onnxruntime", size_bytes=bytes_of(path))
        found.append(Variant(own, path, read_onnx(path)))
    return found


def make_variants(
    request: CompressRequest,
    source: Source,
    original: Pretrained,
    lists: Sequence[Sequence[Step]],
    before: Sequence[Variant],
) -> list[Variant]:  # fmt: skip
    """Write the folder of each list of steps; `before` are variants that there are already.

    Raises `UserError` for a given step that has no effect.
    """
    found: list[Variant] = []
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
        name = excepting(name, exceptions)
        path = request.output / name
        sparse = scheme is None and any(step.name in ZEROS for step in steps)
        float32 = request.output / ONNX if [step.name for step in steps] == [QUANTIZE] else None
        quantized = None
        if scheme is None:
            write_folder(smaller, path, "sparse" if sparse else "onnx", None, (), ())
        else:
            quantized = Quantized(smaller, scheme, seen, float32)
            quantized.write(path, exceptions)
        row = Row(name, [str(step) for step in steps], "PyTorch float32" if sparse else "onnxruntime", exceptions)
        row.size_bytes = bytes_of(path)
        row.parameters, row.nonzero = weights_of(model)
        row.flops_per_token = flops_per_token(model)
        others = [variant.row for variant in (*before, *found)]
        leave_huggingface(smaller, row, request.output, f"{name}/{HUGGINGFACE}", others)
        computed = model if sparse else read_onnx(path)
        found.append(Variant(row, path, computed, quantized=quantized))
    return found


def leave_huggingface(model: Pretrained, row: Row, output: Path, folder: str, others: Iterable[Row] = ()) -> None:
    """Write the model of a variant, as it is before quantization, to `folder` below `output`, and say so in its row.

    Where transformers has no class for it the row has the reason. One of the `others` that differs only in its
    quantization has the folder already.
    """
    for other in others:
        if other.changes == row.changes:
            row.huggingface, row.no_huggingface = other.huggingface, other.no_huggingface
            return
    try:
        model.export(output / folder)
        row.huggingface = folder
    except UserError as error:
        row.no_huggingface = str(error)


def excepting(name: str, exceptions: Sequence[str]) -> str:
    """Return the name of a variant some of whose layers stay in 32 bits."""
    return f"{name}-except-{len(exceptions)}" if exceptions else name
