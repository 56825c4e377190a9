"""Unstructured pruning: single weights become zero. Approximate: the model computes something else.

Masks are bool, one byte a weight, True where a weight is kept. They live beside the model while it trains and never
in a checkpoint: pruned weights are zeros there, from which `masks_of_zeros` makes the masks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanbert.messages import say

Scope = Literal["global", "layer"]

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


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> dict[str, Tensor]:
    """Return masks that drop the weights with the smallest magnitudes.

    Exactly `round(sparsity * n)` are False, of all `n` weights together (global) or of each tensor (layer); equal
    magnitudes go in the order of their position. Han et al. 2015, arXiv 1506.02626. Weights have any floating dtype,
    and are compared as float32.
    """
    if scope == "layer":
        return {name: _drop_smallest([weight], round(sparsity * weight.numel()))[0] for name, weight in weights.items()}
    tensors = list(weights.values())
    masks = _drop_smallest(tensors, round(sparsity * sum(tensor.numel() for tensor in tensors)))
    return dict(zip(weights, masks, strict=True))


def two_of_four_masks(weight: Tensor) -> Tensor:
    """Return the mask that keeps the two largest of each four neighbours along the inputs of `weight` [out, in].

    The pattern that sparse tensor cores compute at twice the speed: Mishra et al. 2021, arXiv 2104.08378. Of equal
    magnitudes the last stay. Raises `ValueError` if the number of inputs is no multiple of 4.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"2:4 sparsity needs inputs in groups of 4, the weight has {weight.shape[-1]}")
    groups = weight.detach().abs().unflatten(-1, (-1, 4))  # [out, in / 4, 4]
    smallest = groups.argsort(dim=-1, stable=True)[..., :2]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, smallest, False).flatten(-2)


def make_masks(weights: Mapping[str, Tensor], sparsity: float, scope: Scope | Literal["2:4"]) -> dict[str, Tensor]:
    """Return the masks of a scope: by magnitude for this share of zeros, or two of each four neighbours."""
    if scope == "2:4":
        return {name: two_of_four_masks(weight) for name, weight in weights.items()}
    return magnitude_masks(weights, sparsity, scope)


def in_fours(weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the matrices whose inputs come in fours, and say how many do not."""
    odd = [name for name, weight in weights.items() if weight.shape[-1] % 4]
    if odd:
        say(f"2:4 leaves {len(odd)} matrices dense, whose inputs do not come in fours: {odd[0]}, ...")
    return {name: weight for name, weight in weights.items() if name not in odd}


def masks_of_zeros(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks that drop what is exactly zero, as in a model that was pruned before."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


@torch.no_grad()
def apply_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the weights that their masks drop to zero, in place."""
    for name, mask in masks.items():
        kept = mask.view(torch.uint8)  # a product with bytes was measured to be 7 times as fast as masked_fill_
        for part, ones in zip(weights[name].view(-1).split(SLICE), kept.view(-1).split(SLICE), strict=True):
            part.mul_(ones)


def sparsity_of(weights: Mapping[str, Tensor]) -> float:
    """Return the share of exact zeros in all tensors together."""
    zeros = sum(int((tensor.detach() == 0).sum()) for tensor in weights.values())
    return zeros / sum(tensor.numel() for tensor in weights.values())


def _drop_smallest(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return masks that drop exactly the `count` smallest magnitudes of all tensors together."""
    masks = [torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device) for tensor in tensors]
    if count == 0:
        return masks
    threshold, equals = _threshold(tensors, count)
    for tensor, mask in zip(tensors, masks, strict=True):
        for bits, kept in zip(_magnitude_bits(tensor), mask.view(-1).split(SLICE), strict=True):
            torch.ge(bits, threshold, out=kept)
            if equals:
                ties = (bits == threshold).nonzero().flatten()[:equals]
                kept[ties] = False
                equals -= len(ties)
    return masks


def _threshold(tensors: Sequence[Tensor], count: int) -> tuple[int, int]:
    """Return the `count`-th smallest magnitude as bits, and how many that equal it are among the `count` smallest.

    A radix selection in two passes, by histograms of the upper and of the lower 16 bits: exact, where a sort or
    `kthvalue` would need a copy of all weights and as many 8-byte indices.
    """
    upper, rank = _bin_of_rank((bits >> 16 for tensor in tensors for bits in _magnitude_bits(tensor)), count)
    lower, rank = _bin_of_rank(
        (bits[bits >> 16 == upper] & 0xFFFF for tensor in tensors for bits in _magnitude_bits(tensor)), rank
    )
    return upper << 16 | lower, rank


def _bin_of_rank(digits: Iterator[Tensor], rank: int) -> tuple[int, int]:
    """Return the digit below 2**16 that is number `rank` (from 1) in sorted order, and its rank among its equals."""
    histogram = sum(torch.bincount(digit, minlength=2**16) for digit in digits)
    assert isinstance(histogram, Tensor)
    up_to = histogram.cumsum(0)
    digit = int((up_to < rank).sum())
    return digit, rank - int(up_to[digit] - histogram[digit])


def _magnitude_bits(tensor: Tensor) -> Iterator[Tensor]:
    """Yield slices of `tensor` as int32 that are ordered as their magnitudes: float32 without its sign bit."""
    for part in tensor.detach().reshape(-1).split(SLICE):
        yield part.float().view(torch.int32) & 0x7FFFFFFF
