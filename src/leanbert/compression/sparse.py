"""Linear layers that hold only the weights that are not zero. Exact, but for the order in which products are summed.

Shapes: m outputs, n inputs, b rows and columns of a block, k blocks that are not zero; where b is 1, weights.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from leanbert.compression.low_rank import replace_everywhere
from leanbert.errors import UserError

INDEX = torch.int32

ROWS = 64
"""Of inputs that are multiplied at a time, so that outputs are in the cache when they are transposed: 4,096 at once
were measured to take twice as long."""

BLOCKS = (1, 4, 8)
"""Rows and columns of the blocks that a matrix may be held in. Larger ones consist of these, and were measured to take
longer (`benchmarks/sparse.py --products`)."""


class SparseLinear(nn.Module):
    """A linear layer in compressed sparse rows, of blocks or not: [..., n] -> [..., m]. It cannot be trained."""

    row_starts: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, layer: nn.Linear, size: int = 1) -> None:
        """Take matrix [m, n] and bias [m] of a layer, which stays as it is, in blocks of `size` rows and columns."""
        super().__init__()
        matrix = _compressed(layer.weight.detach(), size)
        self.shape, self.layout = tuple(matrix.shape), matrix.layout
        # three plain tensors, for one that is sparse cannot be copied with the module
        self.register_buffer("row_starts", matrix.crow_indices().to(INDEX))  # [m / b + 1]
        self.register_buffer("columns", matrix.col_indices().to(INDEX))  # [k]
        self.register_buffer("values", matrix.values())  # [k], of blocks [k, b, b]
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the matrix and add the bias."""
        matrix = torch.sparse_compressed_tensor(
            self.row_starts, self.columns, self.values, self.shape, layout=self.layout, check_invariants=False
        )  # no copy
        rows = x.reshape(-1, self.shape[1])
        outputs = rows.new_empty(len(rows), self.shape[0])
        for part, output in zip(rows.split(ROWS), outputs.split(ROWS), strict=True):
            output.copy_((matrix @ part.T).T)
        if self.bias is not None:
            outputs += self.bias
        return outputs.unflatten(0, x.shape[:-1])


def sparse_bytes(weight: Tensor, size: int = 1) -> int:
    """Return the bytes of a matrix [m, n] in compressed sparse rows: k blocks and columns, and m / b + 1 row starts."""
    tiles = weight.detach().unflatten(0, (-1, size)).unflatten(2, (-1, size))  # [m / b, b, n / b, b]
    count = int((tiles != 0).any(3).any(1).sum())
    return count * (size * size * weight.itemsize + INDEX.itemsize) + (len(weight) // size + 1) * INDEX.itemsize


def block_size(weight: Tensor) -> int:
    """Return the rows and columns of the blocks, of those that torch multiplies, that hold a matrix in fewest bytes."""
    fitting = [size for size in BLOCKS if weight.shape[0] % size == weight.shape[1] % size == 0]
    return min(fitting if _multiplies_blocks() else [1], key=lambda size: sparse_bytes(weight, size))


def _compressed(matrix: Tensor, size: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse [BC]SR tensor support is in beta")
        return matrix.to_sparse_csr() if size == 1 else matrix.to_sparse_bsr((size, size))


@cache
def _multiplies_blocks() -> bool:
    """Return whether this build of torch has a product with blocks, which is MKL's."""
    try:
        _compressed(torch.eye(4), 4) @ torch.eye(4)
    except RuntimeError:
        return False
    return True


def make_sparse(model: nn.Module) -> int:
    """Replace linear layers whose matrix is smaller as in `SparseLinear`, and return how many they are.

    Raises `UserError` if there is none.
    """
    sizes = {layer: block_size(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    smaller = {layer: size for layer, size in sizes.items() if sparse_bytes(layer.weight, size) < layer.weight.nbytes}
    if not smaller:
        raise UserError(
            "weights: sparse, but no layer of this model has enough zeros to take less memory so. Leave it out, or "
            "prune more than half of the weights (configs/memory/pruning.yaml)"
        )
    for layer, size in smaller.items():
        replace_everywhere(model, layer, SparseLinear(layer, size))
    return len(smaller)
