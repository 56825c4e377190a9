"""Pruned weights: bytes on disk and in memory, and time, dense and in compressed sparse rows.

    python benchmarks/sparse.py                 # about a minute on 2 cores

The model is a classifier of texts, modern preset, 4 x 256, with 8,192 tokens: weights are drawn, then the smallest of
each matrix of a linear layer are set to zero. Both hold 32 bits and are timed in turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

from leanbert.compression.pruning import apply_masks, magnitude_masks, prunable
from leanbert.compression.sparse import SparseLinear, make_sparse
from leanbert.compression_report.measuring import run, time_in_turns
from leanbert.models.classifier import Classifier
from leanbert.models.config import EncoderConfig
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import build_model
from leanbert.pretrained.sparse import WEIGHTS, write_sparse
from report import table

VOCABULARY = 8192
LABELS = ["negative", "positive"]
BATCHES = ((1, 32), (32, 128))


def pruned(zeros: float) -> Classifier:
    torch.manual_seed(0)
    model = build_model(
        EncoderConfig(), VOCABULARY, lambda config: Classifier(config, LABELS, "text", "classification")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = prunable(model)
    apply_masks(weights, magnitude_masks(weights, zeros, "layer"))
    return model.eval()


def file_bytes(model: Classifier) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(model, Path(folder), ModelMetadata("classification", labels=LABELS))
        return (Path(folder) / WEIGHTS).stat().st_size


def held_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def held_by_layers(model: nn.Module) -> int:
    return sum(held_bytes(layer) for layer in model.modules() if isinstance(layer, nn.Linear | SparseLinear))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each call")
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    options = parser.parse_args()
    calls, rows = {}, []
    for zeros in options.zeros:
        dense = pruned(zeros)
        sparse = copy.deepcopy(dense)
        make_sparse(sparse)
        for name, model in (("dense", dense), ("sparse", sparse)):
            sizes = [file_bytes(dense), held_by_layers(model), held_bytes(model)]
            rows.append([f"{zeros:.0%}", name, *(f"{size / 2**20:.1f}" for size in sizes)])
            calls |= {(len(rows) - 1, batch): partial(run, model, *batch) for batch in BATCHES}
    found = time_in_turns(calls, options.seconds, iter)
    for (row, _), seconds in found.items():
        rows[row].append(f"{1000 * statistics.median(seconds):.2f}")
    titles = [f"{rows} x {length}, ms" for rows, length in BATCHES]
    print(table(["zeros", "held", "file MiB", "linear layers MiB", "weights MiB", *titles], rows))


if __name__ == "__main__":
    main()
