"""Numbers kept in few bits: block-wise codes of 8 or 4 bits, and bfloat16 written with stochastic rounding.

Rounding is stochastic throughout: the expected value of what is stored is the value itself. An average that moves
2 % a step moves less than half the distance between two codes, so rounding to the nearest code would hold it for
ever; the same holds for a small update of a bfloat16 weight (Gupta et al. 2015, arXiv 1502.02551).

All functions are element-wise arithmetic: no table, no search, nothing read back from a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanbert.memory.step import mix_position

_SMALLEST_SCALE = 1e-28  # keeps the reciprocal of the scale of an all-zero block finite


@dataclass(frozen=True)
class BlockCode:
    """A power-law code of `bits` bits: element = scale * (level / levels) ** power, in blocks with one scale each.

    Block-wise 8-bit states: Dettmers et al. 2022, arXiv 2110.02861. 4-bit states, and an unsigned code without a zero
    (a second moment of zero below a first moment that is not would be a huge step): Li et al. 2023, arXiv 2309.01507.
    Both look codes up in tables; here the levels are spaced by a power law, denser towards zero as theirs are,
    because roots and squares vectorise.
    """

    bits: int
    """8, or 4 with two codes a byte."""
    signed: bool
    """Levels -levels..levels with a zero, or 1..levels without."""
    squarings: int
    """The power is 2 ** squarings."""

    @property
    def levels(self) -> int:
        """Largest level: 127 or 7 signed, 256 or 16 unsigned."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits

    @property
    def block(self) -> int:
        """Elements that share one scale: 256, or 128 at 4 bits."""
        return 256 if self.bits == 8 else 128

    def rows(self, span: slice) -> slice:
        """Return the blocks that hold the elements of `span`, which starts with a block."""
        return slice(span.start // self.block, -(-span.stop // self.block))

    def zeros(self, elements: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return codes, uint8 [blocks, bytes of a block], and scales, fp32 [blocks, 1], of so many zeros."""
        blocks = -(-elements // self.block)
        codes = torch.zeros(blocks, self.block * self.bits // 8, dtype=torch.uint8, device=device)
        return codes, torch.zeros(blocks, 1, device=device)

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the elements, of shape [blocks, elements of a block] and floating type `dtype`."""
        level = self._unpack(codes, dtype)
        if self.signed:
            level.sub_(self.levels + 1)
            power = self._power(level.abs()).copysign_(level)
        else:
            power = self._power(level.add_(1))
        return power.mul_(scales / self.levels**self._exponent)

    def encode(self, values: Tensor, draws: Tensor, codes: Tensor, scales: Tensor) -> None:
        """Write `values` into `codes` and `scales`, each to one of its two neighbouring levels.

        The upper one is taken with the probability that keeps the expected value, to 1/65536; zeros as draws round to
        the nearest level. Unsigned values below the lowest level are raised to it.

        Args:
            values: Floating, [blocks, elements of a block]; overwritten.
            draws: Random int16 of the same shape, uniform over all its values.
            codes: uint8 [blocks, bytes of a block].
            scales: fp32 [blocks, 1].

        """
        magnitude = values.abs() if self.signed else values
        scales.copy_(magnitude.amax(1, keepdim=True).clamp_(min=_SMALLEST_SCALE))
        magnitude.mul_(self.levels**self._exponent / scales)
        low = magnitude.sqrt()
        for _ in range(self.squarings - 1):
            low.sqrt_()
        low.floor_()
        below = self._power(low.clone())
        share = magnitude.sub_(below).div_(self._power(low + 1).sub_(below))
        level = share.add_(draws, alpha=2**-16).add_(0.5).floor_().add_(low)
        level.clamp_(0 if self.signed else 1, self.levels)
        self._pack(level.copysign_(values).add_(self.levels + 1) if self.signed else level.sub_(1), codes)

    @property
    def _exponent(self) -> int:
        return 2**self.squarings

    def _power(self, level: Tensor) -> Tensor:
        for _ in range(self.squarings):
            level.mul_(level)
        return level

    def _pack(self, level: Tensor, codes: Tensor) -> None:
        if self.bits == 8:
            codes.copy_(level)
            return
        half = codes.shape[1]  # a block's first half in the low bits, its second half in the high bits
        codes.copy_(level[:, half:]).bitwise_left_shift_(4).bitwise_or_(level[:, :half].to(torch.uint8))

    def _unpack(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        if self.bits == 8:
            return codes.to(dtype)
        half = codes.shape[1]
        level = torch.empty(codes.shape[0], 2 * half, dtype=dtype, device=codes.device)
        level[:, :half].copy_(codes & 15)
        level[:, half:].copy_(codes >> 4)
        return level


def write_bfloat16(values: Tensor, draws: Tensor, target: Tensor) -> None:
    """Write fp32 `values` [n] into the bfloat16 `target` [n], rounded stochastically to a neighbour.

    A random number below 2 ** 16 is added to the fp32 bit pattern and the low 16 bits are cut off, so the neighbour
    away from zero is taken with the probability that keeps the expected value; bfloat16 values stay exactly. Method:
    Zamirai et al. 2020, arXiv 2010.06192; the same bit arithmetic is in torchao's low-bit optimizers.

    Args:
        values: fp32 [n]; overwritten. NaN stays NaN.
        draws: Random int16 [n], uniform over all its values.
        target: bfloat16 [n], contiguous.

    """
    bits = values.view(torch.int32)
    bits.clamp_(max=0x7FFF0000)  # CUDA's NaN, 0x7FFFFFFF, would overflow to a harmless looking -0
    bits.add_(draws).add_(2**15).bitwise_right_shift_(16)
    target.view(torch.int16).copy_(bits)


def draw_int16(elements: int, device: torch.device, *position: int) -> Tensor:
    """Return random int16 [elements], uniform over all its values: a function of the position.

    Four are cut from each draw of 64 bits, from a generator of this call's own.
    """
    generator = torch.Generator(device).manual_seed(mix_position(*position))
    words = torch.empty(-(-elements // 4), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:elements]
