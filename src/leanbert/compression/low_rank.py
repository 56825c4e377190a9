"""Factorisation: the matrix of a linear layer or of an embedding becomes the product of two thin ones. Approximate.

Shapes: m outputs, n inputs, r rank, R rows of a token embedding, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from leanbert.compression.pruning import prunable
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.classifier import Classifier
from leanbert.models.heads import Output
from leanbert.models.linear import Linear
from leanbert.models.packed_inputs import PackedInputs

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
    down, up, kept = _truncated_svd(matrix if root is None else matrix @ root, energy)
    if root is not None:  # down = right @ root^-1
        down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return Factors(down.to(weight.dtype), up.to(weight.dtype), kept)


def _truncated_svd(matrix: Tensor, energy: float) -> Factors:
    """Return the factors of the lowest rank that keep this fraction of the sum of squares."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    rank = min(int((share < energy * (1.0 - 1e-12)).sum()) + 1, len(values))
    return Factors(right[:rank], left[:, :rank] * values[:rank], float(share[rank - 1]))


@torch.no_grad()
def factorise_embedding(table: Tensor, energy: float, counts: Tensor) -> Factors:
    """Return the factors `down` [r, D] and `up` [R, r] that keep the fraction `energy` of what tokens look up.

    `counts` [R]: how often each was looked up; one is added, so that none is free to become anything. Computed in
    float64, as `factorise` where inputs are one token each.
    """
    often = (counts.double() + 1.0).sqrt()[:, None]  # [R, 1]
    down, up, kept = _truncated_svd(often * table.double(), energy)
    return Factors(down.to(table.dtype), (up / often).to(table.dtype), kept)


def _damped(moments: Tensor) -> Tensor:
    added = DAMPING * moments.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return moments + added * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


@contextmanager
def second_moments(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the second moments [n, n] of the inputs of linear layers by name, in float64, while the model runs."""
    found: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def collect(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        rows = given[0].detach().flatten(0, -2).double()
        products = rows.T @ rows
        found[name] = found[name] + products if name in found else products
        counts[name] += len(rows)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(module.register_forward_pre_hook(partial(collect, name)))
        yield found
    for name, count in counts.items():
        found[name] /= max(count, 1)


@contextmanager
def token_counts(model: EncoderModel) -> Iterator[Tensor]:
    """Count how often each row of the token embedding is looked up, int64 [R], while the model runs; never padding."""
    embeddings = model.encoder.embeddings
    counts = torch.zeros(len(embeddings.token.weight), dtype=torch.int64, device=model.device)

    def count(_: nn.Module, given: tuple[PackedInputs, ...]) -> None:
        counts.add_(torch.bincount(given[0].input_ids[given[0].real], minlength=len(counts)))

    with embeddings.register_forward_pre_hook(count):
        yield counts


def make_embedding_low_rank(model: EncoderModel, energy: float, counts: Tensor) -> None:
    """Replace the token embedding of the model; `counts` as `token_counts` gives them.

    Raises `UserError` where the table is also the output matrix, or two factors would have more weights.
    """
    embeddings = model.encoder.embeddings
    table = embeddings.token.weight
    if not isinstance(model, Classifier):
        raise UserError("low_rank_embedding: here the token embedding is also the output matrix. Leave it out")
    down, up, _ = factorise_embedding(table, energy, counts)
    if down.numel() + up.numel() >= table.numel():
        raise UserError(
            f"low_rank_embedding: at {energy:.0%} of the energy it gets no smaller. Keep less, or leave it out"
        )
    embeddings.token = nn.Embedding.from_pretrained(up, freeze=False)
    embeddings.projection = Linear(len(down), down.shape[1], bias=False)
    embeddings.projection.weight = nn.Parameter(down.T.contiguous())


def make_low_rank(model: EncoderModel, energy: float, moments: dict[str, Tensor] | None = None) -> int:
    """Replace the linear layers of the model that have fewer weights as two factors, and return how many they are.

    Output layers stay as they are. `moments` by name, see `second_moments`; None: the matrices alone count.

    Raises:
        UserError: No layer gets smaller, or a layer was never run for its moments.

    """
    replaced = 0
    for name in [name.removesuffix(".weight") for name in prunable(model)]:
        layer = model.get_submodule(name)
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
