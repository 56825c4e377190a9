"""Factorisation: the matrix of a linear layer becomes the product of two thin ones. Approximate.

Shapes: m outputs, n inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanbert.compression.pruning import prunable
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.heads import Output

DAMPING = 1e-4
"""Of the mean square of the inputs, added to the square of each, so that inputs that never vary have an inverse."""


class LowRankLinear(nn.Module):
    """A linear layer of two matrices: [..., n] -> [..., r] -> [..., m]."""

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
        """Take `down` [r, n], `up` [m, r] and the bias [m]."""
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.bias = bias if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by both."""
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up, self.bias)


class Factors(NamedTuple):
    """`up` [m, r] times `down` [r, n]; of the energy of the outputs they keep the fraction `kept`."""

    down: Tensor
    up: Tensor
    kept: float


@torch.no_grad()
def factorise(weight: Tensor, energy: float, moments: Tensor | None = None) -> Factors:
    """Return the factors of the lowest rank that keep the fraction `energy` of a matrix, computed in float64.

    Energy is the sum of squares: of the matrix [m, n] or, with the second `moments` of its inputs [n, n], the mean of
    x x^T, of its outputs. Then the matrix is whitened by their Cholesky factor before the singular value decomposition,
    which makes the error of the outputs the smallest that there is at this rank (Wang et al. 2024, SVD-LLM,
    arXiv 2403.07378).
    """
    matrix = weight.double()
    root = None if moments is None else torch.linalg.cholesky(_damped(moments.double()))  # [n, n]
    left, values, right = torch.linalg.svd(matrix if root is None else matrix @ root, full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    rank = min(int((share < energy * (1.0 - 1e-12)).sum()) + 1, len(values))
    down = right[:rank]
    if root is not None:  # down = right @ root^-1
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    up = left[:, :rank] * values[:rank]
    return Factors(down.to(weight.dtype), up.to(weight.dtype), float(share[rank - 1]))


def _damped(moments: Tensor) -> Tensor:
    added = DAMPING * moments.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return moments + added * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


@contextmanager
def second_moments(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the second moments [n, n] of the inputs of linear layers by name, in float64, while the model runs."""
    found: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def collect(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().flatten(0, -2).double()
            counts[name] = counts.get(name, 0) + len(rows)
            total = found[name] if name in found else torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype)
            found[name] = total.to(rows.device) + rows.T @ rows

        return hook

    handles = [
        module.register_forward_pre_hook(collect(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name, count in counts.items():
            found[name] /= max(count, 1)


def make_low_rank(model: EncoderModel, energy: float, moments: dict[str, Tensor] | None = None) -> int:
    """Replace the linear layers of the model that have fewer weights as two factors, and return how many they are.

    Output layers stay as they are. `moments` by name, see `second_moments`; None: the matrices alone count.

    Raises:
        UserError: No layer gets smaller, or a layer was never run for its moments.

    """
    modules = dict(model.named_modules())
    replaced = 0
    for name in [name.removesuffix(".weight") for name in prunable(model)]:
        layer = modules[name]
        assert isinstance(layer, nn.Linear)
        if isinstance(layer, Output):
            continue
        if moments is not None and name not in moments:
            raise UserError(f"low_rank: {name} was not run on the calibration data. Give more of it")
        factors = factorise(layer.weight, energy, None if moments is None else moments[name])
        if factors.down.numel() + factors.up.numel() < layer.weight.numel():
            new = LowRankLinear(factors.down, factors.up, None if layer.bias is None else layer.bias.detach())
            replace_everywhere(model, layer, new)
            replaced += 1
    if not replaced:
        raise UserError(f"low_rank: at {energy:.0%} of the energy no layer gets smaller. Keep less, or leave it out")
    return replaced


def replace_everywhere(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` where `old` is, in each module that has it: blocks of a shared decoder are the encoder's."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)
