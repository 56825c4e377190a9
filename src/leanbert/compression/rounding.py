"""Numbers rounded as onnxruntime's quantizers round them, with a gradient, for quantization-aware training.

Jacob et al. 2018, arXiv 1712.05877: the forward pass sees rounded numbers, the backward pass takes rounding for the
identity (straight through; Bengio et al. 2013, arXiv 1308.3432). Scales follow the numbers and have no gradient.

Not by `torch.fake_quantize_per_channel_affine`: it multiplies by the reciprocal of a scale where the quantizers divide,
which now and then gives the neighbouring number; it keeps a byte a number for the backward pass; and a plan, whose
tensors have no memory, cannot run it.

Shapes: m outputs, n inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from leanbert.compression.onnx.quantization import BLOCK, Scheme
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.classifier import Classifier
from leanbert.models.embeddings import Embeddings
from leanbert.models.heads import MaskedLMHead
from leanbert.models.linear import Linear, Rounding


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounding) -> Tensor:
        return rounding(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def _straight_through(rounding: Rounding) -> Rounding:
    @functools.wraps(rounding)
    def apply(x: Tensor) -> Tensor:
        return _StraightThrough.apply(x, rounding)

    return apply


@_straight_through
def in_channels(weight: Tensor) -> Tensor:
    """Round a matrix [m, n] to 7 bits, -64 to 64 with a scale for each output, as `quantize_dynamic` does."""
    peak = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    return _round(weight, peak / 64, -64, 64)


@_straight_through
def in_blocks(weight: Tensor) -> Tensor:
    """Round a matrix [m, n] to 4 bits, -8 to 7 with a scale for each `BLOCK` inputs, as `MatMulNBitsQuantizer` does.

    The number of a block that is farthest from 0 becomes -8 exactly; halves go up.
    """
    return _in_blocks(weight, lambda x: x.add_(8.5).floor_().sub_(8))


@_straight_through
def table_in_blocks(table: Tensor) -> Tensor:
    """Round the rows of a table [m, n] in the same way, but that halves go to the even number."""
    return _in_blocks(table, Tensor.round_)


def _in_blocks(weight: Tensor, nearest: Rounding) -> Tensor:
    width = weight.shape[1]
    whole = nn.functional.pad(weight, (0, -width % BLOCK)) if width % BLOCK else weight
    blocks = whole.unflatten(1, (-1, BLOCK))
    high, low = blocks.amax(-1, keepdim=True), blocks.amin(-1, keepdim=True)
    peak = torch.where(high.abs() > low.abs(), high, low)
    return _round(blocks, peak / -8, -8, 7, nearest).flatten(1)[:, :width]


@_straight_through
def whole(x: Tensor) -> Tensor:
    """Round a tensor of any shape to 8 bits, 256 steps of one size that have 0 among them.

    As onnxruntime rounds a table of int8, and in each call what a product reads (`DynamicQuantizeLinear`).
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    low, high = x.amin().clamp(max=0.0).to(wide), x.amax().clamp(min=0.0).to(wide)
    scale = (high - low) / 255
    zero = (-low / scale).nan_to_num().round().to(x.dtype)
    return _round(x, scale.to(x.dtype), -zero, 255 - zero)


def _round(x: Tensor, scale: Tensor, low: Any, high: Any, nearest: Rounding = Tensor.round_) -> Tensor:
    """Return the multiples of `scale` that are nearest, from `low` to `high` times it."""
    scale = torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, 1.0, scale)
    return nearest(x / scale).clamp_(low, high).mul_(scale)


ROUNDINGS: dict[Scheme, tuple[Rounding, Rounding]] = {
    "int8": (in_channels, whole),
    "int4": (in_blocks, table_in_blocks),
    "int8_int4": (in_channels, table_in_blocks),
}
"""How products and embedding tables are rounded."""


def set_rounding(model: EncoderModel, scheme: Scheme | None, inputs: bool = False) -> None:
    """Let a model compute with weights as its ONNX files will have them, or (None) as they are.

    Weights stay as they are where they are stored. `inputs`: round what products read, too, as int8 does.

    Raises:
        UserError: A layer of a model of one's own has no switch, but would be quantized.

    """
    product, table = (None, None) if scheme is None else ROUNDINGS[scheme]
    ties = not isinstance(model, Classifier) and not (scheme == "int4" and model.config.hidden_size % BLOCK)
    tied = model.stacks[-1].embeddings if ties else None  # reads the table of the output's product
    plain: set[int] = set()
    if scheme == "int4" and isinstance(model, Classifier) and model.of == "text":
        plain = {id(module) for module in model.head.modules()}  # one row a text: an operator that int4 leaves alone
    tables = {id(child) for module in model.modules() if isinstance(module, Embeddings) for child in module.children()}
    for name, module in model.named_modules():
        if isinstance(module, Embeddings):
            module.round_tokens = product if module is tied else table
            module.round_positions = table
            module.round_segments = None if model.task == "seq2seq" else table  # all of one segment: no table is read
        elif isinstance(module, Linear | MaskedLMHead):
            module.round_weight = None if id(module) in plain else product
            module.round_input = whole if inputs else None
        elif isinstance(module, nn.Linear | nn.Embedding) and id(module) not in tables:
            raise UserError(
                f"QuantizationAwareTraining: {name} is a torch.nn.{type(module).__name__}, which is not rounded. "
                "Make it of leanbert.models.linear and leanbert.models.embeddings"
            )
