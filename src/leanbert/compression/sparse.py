"""Linear layers that hold only the weights that are not zero. Exact, but for the order in which products are summed.

Shapes: m outputs, n inputs, k weights that are not zero.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from leanbert.compression.low_rank import replace_everywhere
from leanbert.errors import UserError

INDEX = torch.int32

ROWS = 64
"""Of inputs that are multiplied at a time, so that outputs are in the cache when they are transposed: 4,096 at once
were measured to take twice as long."""


class SparseLinear(nn.Module):
    """A linear layer whose matrix is in compressed sparse rows (CSR): [..., n] -> [..., m]. It cannot be trained."""

    row_starts: Tensor
    columns: Tensor
    values: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        """Take matrix [m, n] and bias [m] of a layer, which stays as it is."""
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            matrix = layer.weight.detach().to_sparse_csr()
        self.shape = tuple(matrix.shape)
        # three plain tensors, for one that is sparse cannot be copied with the module
        self.register_buffer("row_starts", matrix.crow_indices().to(INDEX))  # [m + 1]
        self.register_buffer("columns", matrix.col_indices().to(INDEX))  # [k]
        self.register_buffer("values", matrix.values())  # [k]
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the matrix and add the bias."""
        matrix = torch.sparse_csr_tensor(
            self.row_starts, self.columns, self.values, self.shape, check_invariants=False
        )  # no copy
        rows = x.reshape(-1, self.shape[1])
        outputs = rows.new_empty(len(rows), self.shape[0])
        for part, output in zip(rows.split(ROWS), outputs.split(ROWS), strict=True):
            output.copy_((matrix @ part.T).T)
        if self.bias is not None:
            outputs += self.bias
        return outputs.unflatten(0, x.shape[:-1])


def sparse_bytes(weight: Tensor) -> int:
    """Return the bytes of a matrix [m, n] in compressed sparse rows: k values and columns, and m + 1 row starts."""
    return int(weight.count_nonzero()) * (weight.itemsize + INDEX.itemsize) + (len(weight) + 1) * INDEX.itemsize


def make_sparse(model: nn.Module) -> int:
    """Replace linear layers whose matrix is smaller in compressed sparse rows, and return how many they are.

    Raises `UserError` if there is none.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and sparse_bytes(module.weight) < module.weight.nbytes
    ]
    if not layers:
        raise UserError(
            "weights: sparse, but no layer of this model has enough zeros to take less memory so. Leave it out, or "
            "prune more than half of the weights (configs/memory/pruning.yaml)"
        )
    for layer in layers:
        replace_everywhere(model, layer, SparseLinear(layer))
    return len(layers)
