"""Pruned weights: bytes on disk and in memory, and time, dense and in compressed sparse rows.

    python benchmarks/sparse.py                 # about a minute on 2 cores
    python benchmarks/sparse.py --block 8       # weights leave in blocks of 8 x 8
    python benchmarks/sparse.py --products      # one product, by the size of the blocks

The model is a classifier of texts, modern preset, 4 x 256, with 8,192 tokens: weights are drawn, then the smallest of
each matrix of a linear layer are set to zero. All hold 32 bits and are timed in turns.
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

from leanbert.compression.pruning import apply_masks, make_masks, prunable, tiled
from leanbert.compression.sparse import SparseLinear, make_sparse
from leanbert.compression_report.measuring import prepared, time_in_turns
from leanbert.models.classifier import Classifier
from leanbert.models.config import EncoderConfig
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import build_model
from leanbert.pretrained.sparse import WEIGHTS, write_sparse
from report import table

VOCABULARY = 8192
LABELS = ["negative", "positive"]
NEURONS = 680  # where blocks leave: the preset has 682, which are no multiple of a block
BATCHES = ((1, 32), (32, 128))
SHAPES = (
    ("dense", 1, None), ("weights", 1, 1), ("blocks of 4", 4, 4), ("blocks of 8", 8, 8), ("blocks of 16", 16, 16),
    ("blocks of 16, in 8", 16, 8), ("blocks of 32", 32, 32),
)  # fmt: skip
"""Name, blocks that leave together, and those that are held; None: dense."""


def pruned(zeros: float, block: int) -> Classifier:
    torch.manual_seed(0)
    model = build_model(
        EncoderConfig(intermediate_size=NEURONS if block > 1 else None),
        VOCABULARY,
        lambda config: Classifier(config, LABELS, "text", "classification"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    weights = prunable(model)
    apply_masks(weights, make_masks(tiled(weights, "layer", block), zeros, "layer", block))
    return model.eval()


def file_bytes(model: Classifier) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(model, Path(folder), ModelMetadata("classification", labels=LABELS))
        return (Path(folder) / WEIGHTS).stat().st_size


def held_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def held_by_layers(model: nn.Module) -> int:
    return sum(held_bytes(layer) for layer in model.modules() if isinstance(layer, nn.Linear | SparseLinear))


@torch.inference_mode()
def products(shares: list[float], seconds: float) -> str:
    """Return milliseconds of a product with 32 and with 4,096 rows, dense and in blocks that the weights left in."""
    rows = []
    for zeros in shares:
        torch.manual_seed(0)
        calls: dict[tuple[str, int], partial[torch.Tensor]] = {}
        sizes = {}
        for name, block, held in SHAPES:
            layer = nn.Linear(256, 1024, bias=False)
            apply_masks(weights := {"": layer.weight}, make_masks(weights, zeros, "layer", block))
            module = layer if held is None else SparseLinear(layer, held)
            sizes[name] = held_bytes(module)
            for count in (32, 4096):
                calls[name, count] = partial(module, torch.randn(count, 256))
        found = time_in_turns(calls, seconds, iter)
        for name, _, _ in SHAPES:
            times = [f"{1000 * statistics.median(found[name, count]):.2f}" for count in (32, 4096)]
            rows.append([f"{zeros:.0%}", name, f"{sizes[name] / 2**10:,.0f}", *times])
    return table(["zeros", "held", "KiB", "32 rows, ms", "4,096 rows, ms"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each call")
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--block", type=int, default=1, help="rows and columns of blocks that leave together")
    parser.add_argument(
        "--products", action="store_true", help="time one product only, of 1,024 outputs and 256 inputs"
    )
    options = parser.parse_args()
    if options.products:
        print(products(options.zeros, options.seconds))
        return
    calls, rows = {}, []
    for zeros in options.zeros:
        dense = pruned(zeros, options.block)
        sparse = copy.deepcopy(dense)
        make_sparse(sparse)
        for name, model in (("dense", dense), ("sparse", sparse)):
            sizes = [file_bytes(dense), held_by_layers(model), held_bytes(model)]
            rows.append([f"{zeros:.0%}", name, *(f"{size / 2**20:.1f}" for size in sizes)])
            calls |= {(len(rows) - 1, batch): prepared(model, *batch) for batch in BATCHES}
    found = time_in_turns(calls, options.seconds, iter)
    for (row, _), seconds in found.items():
        rows[row].append(f"{1000 * statistics.median(seconds):.2f}")
    titles = [f"{rows} x {length}, ms" for rows, length in BATCHES]
    print(table(["zeros", "held", "file MiB", "linear layers MiB", "weights MiB", *titles], rows))


if __name__ == "__main__":
    main()
