"""Unstructured pruning: single weights, or square blocks of them, become zero. Approximate.

Masks are bool, one byte a weight, True where a weight is kept. They live beside the model while it trains and never
in a checkpoint: pruned weights are zeros there, from which `masks_of_zeros` makes the masks again. Of a sharded weight
each device has the mask of its rows; what all weights are compared by is the same on all devices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leanbert.messages import say
from leanbert.shards import counts_before, from_own, own, sum_over_shards

Scope = Literal["global", "layer", "2:4", "4:8"]

SCOPES: tuple[Scope, ...] = get_args(Scope)

PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}
"""Scopes of which so many of so many neighbours along the inputs stay, half of them. Sparse tensor cores compute 2:4 at
twice the speed (Mishra et al. 2021, arXiv 2104.08378); 4:8 leaves more choice (Zhou et al. 2021, arXiv 2102.04010)."""

SLICE = 2**22
"""Weights that are looked at together: transients are three times 4 bytes for each of them, 48 MiB."""


def cubic_sparsity(step: int, start: int, end: int, final: float) -> float:
    """Return the share of zeros after `step` steps: 0 up to `start`, `final` from `end` on, most of it early.

    Zhu and Gupta 2017, arXiv 1710.01878, equation 1 with an initial sparsity of 0.
    """
    if step >= end:
        return final
    if step <= start:
        return 0.0
    return final * (1.0 - (1.0 - (step - start) / (end - start)) ** 3)


def prunable(model: nn.Module, include_embeddings: bool = False) -> dict[str, nn.Parameter]:
    """Return the matrices of linear layers by name, and of embeddings if asked; never norms or biases.

    The head's output matrix is the token embedding. A matrix that two modules share is returned once.
    """
    kinds = (nn.Linear, nn.Embedding) if include_embeddings else (nn.Linear,)
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            weight: Any = module.weight
            if not any(weight is other for other in found.values()):
                found[f"{name}.weight"] = weight
    return found


def magnitude_masks(
    weights: Mapping[str, Tensor], sparsity: float, scope: Scope = "global", *, signed: bool = False
) -> dict[str, Tensor]:
    """Return masks that drop the weights with the smallest magnitudes; `signed`: the smallest scores.

    Exactly `round(sparsity * n)` are False, of all `n` weights together (global) or of each tensor (layer); equal ones
    go in the order of their position. Han et al. 2015, arXiv 1506.02626. Weights have any floating dtype, and are
    compared as float32.
    """
    if scope == "layer":
        return {
            name: _drop_smallest([weight], round(sparsity * weight.numel()), signed)[0]
            for name, weight in weights.items()
        }
    tensors = list(weights.values())
    masks = _drop_smallest(tensors, round(sparsity * sum(tensor.numel() for tensor in tensors)), signed)
    return dict(zip(weights, masks, strict=True))


def n_of_m_masks(weight: Tensor, n: int, m: int, *, signed: bool = False) -> Tensor:
    """Return the mask that keeps the `n` largest of each `m` neighbours along the inputs of `weight` [out, in].

    By magnitude, or `signed` as they are; of equal ones the last stay. Raises `ValueError` if the number of inputs is
    no multiple of `m`.
    """
    if weight.shape[-1] % m:
        raise ValueError(f"{n}:{m} sparsity needs inputs in groups of {m}, the weight has {weight.shape[-1]}")
    weight = own(weight.detach())
    groups = (weight if signed else weight.abs()).unflatten(-1, (-1, m))  # [out, in / m, m]
    smallest = groups.argsort(dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, smallest, False).flatten(-2)


def block_scores(weight: Tensor, size: int, *, signed: bool = False) -> Tensor:
    """Return the Frobenius norm of each square block of `weight` [out, in], float32 [out / size, in / size].

    `signed`: the sum of its scores, as if all weights of a block had one (Lagunas et al. 2021, arXiv 2109.04838).
    """
    rows, columns = own(weight).shape
    tiles = own(weight.detach()).view(rows // size, size, columns // size, size)
    if signed:
        scores = tiles.sum((1, 3), dtype=torch.float32)
    else:
        scores = torch.linalg.vector_norm(tiles, dim=(1, 3), dtype=torch.float32)
    return from_own(scores, weight, torch.Size((weight.shape[0] // size, columns // size)))


def make_masks(
    weights: Mapping[str, Tensor], sparsity: float, scope: Scope, block_size: int = 1, *, signed: bool = False
) -> dict[str, Tensor]:
    """Return the masks of a scope: this share of zeros, of weights or square blocks of them, or the half of a pattern.

    The matrices are those that `tiled` returns. `signed`: scores instead of weights, of which the largest stay.
    """
    if scope in PATTERNS:
        return {name: n_of_m_masks(weight, *PATTERNS[scope], signed=signed) for name, weight in weights.items()}
    if block_size == 1:
        return magnitude_masks(weights, sparsity, scope, signed=signed)
    blocks = {name: block_scores(weight, block_size, signed=signed) for name, weight in weights.items()}
    masks = magnitude_masks(blocks, sparsity, scope, signed=signed)
    return {
        name: mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1) for name, mask in masks.items()
    }


def tiled(weights: Mapping[str, nn.Parameter], scope: Scope, block_size: int = 1) -> dict[str, nn.Parameter]:
    """Return the matrices [out, in] that consist of whole groups or blocks, and say how many do not."""
    rows, columns = (1, PATTERNS[scope][1]) if scope in PATTERNS else (block_size, block_size)
    odd = [name for name, weight in weights.items() if weight.shape[0] % rows or weight.shape[1] % columns]
    if odd:
        say(f"pruning leaves {len(odd)} matrices dense that are no multiple of {rows} x {columns}: {odd[0]}, ...")
    return {name: weight for name, weight in weights.items() if name not in odd}


@torch.no_grad()
def add_movement(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Subtract weight x gradient from the float32 scores, in place: those of weights that move away from zero grow.

    Sanh, Wolf and Rush 2020, arXiv 2005.07683, equation 4, without the learning rate, which is the same for all. A
    weight without a gradient keeps its score.
    """
    for name, total in scores.items():
        if (gradient := weights[name].grad) is None:
            continue
        flat = (own(total).view(-1), own(weights[name]).view(-1), own(gradient).reshape(-1))
        for part, weight, slope in zip(*(tensor.split(SLICE) for tensor in flat), strict=True):
            part.addcmul_(weight.float(), slope.float(), value=-1.0)


def masks_of_zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks that drop what is exactly zero, as in a model that was pruned before."""
    return {name: own(weight.detach()) != 0 for name, weight in weights.items()}


@torch.no_grad()
def apply_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the weights that their masks drop to zero, in place."""
    for name, mask in masks.items():
        kept = mask.view(torch.uint8)  # a product with bytes was measured to be 7 times as fast as masked_fill_
        for part, ones in zip(own(weights[name]).view(-1).split(SLICE), kept.view(-1).split(SLICE), strict=True):
            part.mul_(ones)


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Return the share of exact zeros in all tensors together."""
    zeros = sum(int(sum_over_shards((own(tensor) == 0).sum(), tensor)) for tensor in weights.values())
    return zeros / sum(tensor.numel() for tensor in weights.values())


def _drop_smallest(tensors: Sequence[Tensor], count: int, signed: bool) -> list[Tensor]:
    """Return masks that drop exactly the `count` smallest of all tensors together."""
    masks = [torch.ones_like(own(tensor), dtype=torch.bool, requires_grad=False) for tensor in tensors]
    if count == 0:
        return masks
    threshold, equals = _threshold(tensors, count, signed)
    for tensor, mask in zip(tensors, masks, strict=True):
        ties = sum(int((bits == threshold).sum()) for bits in _ordered_bits([tensor], signed)) if equals else 0
        before, ties = counts_before(ties, tensor) if equals else (0, 0)
        here, equals = max(0, equals - before), max(0, equals - ties)
        for bits, kept in zip(_ordered_bits([tensor], signed), mask.view(-1).split(SLICE), strict=True):
            torch.ge(bits, threshold, out=kept)
            if here:
                dropped = (bits == threshold).nonzero().flatten()[:here]
                kept[dropped] = False
                here -= len(dropped)
    return masks


def _threshold(tensors: Sequence[Tensor], count: int, signed: bool) -> tuple[int, int]:
    """Return the `count`-th smallest as ordered bits, and how many that equal it are among the `count` smallest.

    A radix selection in two passes, by histograms of the upper and of the lower 16 bits: exact, where a sort or
    `kthvalue` would need a copy of all weights and as many 8-byte indices.
    """
    like = tensors[0]
    upper, rank = _bin_of_rank(((bits >> 16).add_(2**15) for bits in _ordered_bits(tensors, signed)), count, like)
    upper -= 2**15
    digits = (bits[bits >> 16 == upper] & 0xFFFF for bits in _ordered_bits(tensors, signed))
    lower, rank = _bin_of_rank(digits, rank, like)
    return upper << 16 | lower, rank


def _bin_of_rank(digits: Iterator[Tensor], rank: int, like: Tensor) -> tuple[int, int]:
    """Return the digit below 2**16 that is number `rank` (from 1) in sorted order, and its rank among its equals.

    All devices that together have `like` have some of the digits.
    """
    histogram = torch.zeros(2**16, dtype=torch.int64, device=own(like).device)
    for part in digits:
        histogram += torch.bincount(part, minlength=2**16)
    histogram = sum_over_shards(histogram, like)
    up_to = histogram.cumsum(0)
    digit = int((up_to < rank).sum())
    return digit, rank - int(up_to[digit] - histogram[digit])


def _ordered_bits(tensors: Iterable[Tensor], signed: bool) -> Iterator[Tensor]:
    """Yield slices of the tensors as int32 that are ordered as the float32 numbers, or as their magnitudes.

    The bits of positive floats, read as integers, are; of negative ones all bits but the sign are inverted.
    """
    for tensor in tensors:
        for part in own(tensor.detach()).reshape(-1).split(SLICE):
            bits = part.float().view(torch.int32)
            yield (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits) if signed else bits & 0x7FFFFFFF
