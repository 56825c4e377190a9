"""Folders with a model in ONNX files, written whole and compared with the model."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from leanbert.compression.onnx.graphs import graphs_of, write_graph
from leanbert.compression.onnx.quantization import Scheme, Seen, quantize
from leanbert.compression.onnx.runtime import OnnxModel, read_onnx
from leanbert.errors import UserError
from leanbert.files import explain_disk_errors, scratch_folder, temporary
from leanbert.models.base import EncoderModel
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import ModelMetadata

TOLERANCE = 1e-4
"""Largest difference of float32 outputs, relative to the largest output where that is above 1."""

ROUNDINGS = 10
"""So many times the model's own rounding in float32 is no difference either: where attention is sharp, it is large."""

LENGTHS = (1, 7, 128)
"""Of the rows that a written model is compared on, as far as it has positions."""


def write_onnx(
    model: EncoderModel, folder: Path, metadata: ModelMetadata, scheme: Scheme | None = None,
    exceptions: Sequence[str] = (), seen: Sequence[Seen] = (), float32: Path | None = None,
) -> None:  # fmt: skip
    """Write the files of a model, quantized if asked but for the layers `exceptions`.

    Before they are put into `folder`, they are opened by onnxruntime, and float32 is compared with the model.
    What is quantized are the files in the folder `float32`, which this has written of the same model; None: they are
    made. Raises `UserError` if something is not installed, the disk is full, or outputs differ, and as `quantize`.
    """
    model = deepcopy(model).float().eval()
    with scratch_folder() as scratch, explain_disk_errors(scratch, "TMPDIR"), ExitStack() as stack:
        if float32 is None:
            float32 = scratch
            for name, graph in graphs_of(model).items():
                write_graph(graph, scratch / name, metadata)
            worst = largest_difference(model, read_onnx(scratch))
            if not (worst <= TOLERANCE or worst <= ROUNDINGS * _rounding(model)):
                raise UserError(f"{folder}: onnxruntime computes something else, by {worst:.1e}. Nothing was written")
        written = sorted(float32.glob("*.onnx"))
        if scheme is not None:
            (scratch / scheme).mkdir()
            quantize(float32, scratch / scheme, scheme, exceptions, seen)
            if not largest_difference(model, read_onnx(scratch / scheme)) < math.inf:
                raise UserError(f"{folder}: quantized outputs are not finite. Export without --quantize {scheme}")
            written = [scratch / scheme / file.name for file in written]
        stack.enter_context(explain_disk_errors(folder))
        folder.mkdir(parents=True, exist_ok=True)
        building = {folder / file.name: stack.enter_context(temporary(folder / file.name)) for file in written}
        for file, copy in zip(written, building.values(), strict=True):
            shutil.copyfile(file, copy)
        for path, copy in building.items():
            os.replace(copy, path)


@torch.no_grad()
def largest_difference(model: EncoderModel, written: OnnxModel | EncoderModel) -> float:
    """Return the largest difference of outputs on drawn tokens, relative to the largest output where that is above 1.

    Rows are of several lengths, alone and together, with and without padding and packed documents; where something is
    not a number the result is that.
    """
    worst = torch.zeros(())
    for inputs in _rows(model):
        for one, other in zip(_outputs(model, inputs), _outputs(written, inputs), strict=True):
            worst = torch.maximum(worst, (one - other).abs().max() / one.abs().max().clamp(min=1.0))
    return float(worst)


def _rounding(model: EncoderModel) -> float:
    """Return by how much a model in float32 differs from itself in float64."""
    return largest_difference(deepcopy(model).double(), model)


def _rows(model: EncoderModel) -> Iterator[PackedInputs]:
    generator = torch.Generator().manual_seed(0)
    config, tokens = model.config, min(size for _, size in model.token_tables)
    for length in sorted({min(length, config.max_positions) for length in LENGTHS}):
        for rows in (1, 7):
            ids = torch.randint(tokens, (rows, length), generator=generator)
            segments = None
            if config.type_vocab_size > 0 and model.task != "seq2seq":
                segments = torch.randint(config.type_vocab_size, ids.shape, generator=generator)
            inputs = PackedInputs.whole_rows(ids, segments)
            place = torch.arange(length)
            second = (place >= -(-length // 2)).long().expand_as(ids)  # the last row is half padding, or two documents
            last = (torch.arange(rows) == rows - 1)[:, None] & (rows > 1)
            yield replace(inputs, document_ids=torch.where(last, -second, 0))
            position = torch.where(last, place - second * -(-length // 2), place)
            yield replace(inputs, document_ids=torch.where(last, second, 0), position_ids=position)


def _outputs(model: EncoderModel | OnnxModel, inputs: PackedInputs) -> tuple[Tensor, ...]:
    """Return the outputs at tokens: hidden states, and scores (of texts at their first tokens)."""
    hidden = model.encode(inputs)[inputs.real]
    if model.task == "seq2seq":
        return hidden, model(inputs, inputs)[inputs.real]
    first = inputs.position_ids == 0
    index = torch.arange(inputs.input_ids.shape[1]).expand_as(inputs.input_ids)
    of_texts = getattr(model, "of", None) == "text"
    return hidden, model(inputs, index)[inputs.real & first if of_texts else inputs.real]
