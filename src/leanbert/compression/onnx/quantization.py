"""ONNX files with weights in 8 or 4 bits, by onnxruntime's own quantizers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from leanbert.errors import UserError
from leanbert.files import scratch_folder

Scheme = Literal["int8", "int4"]
"""int8: matrix products of 8-bit weights and activations, which are scaled in each call (dynamic quantization).
int4: weights of 4 bits in blocks, products in higher precision."""

SCHEMES = get_args(Scheme)

BLOCK = 32
"""4-bit weights that share a scale; as many as onnxruntime's fastest kernels want at least."""

OPERATORS = ("MatMul", "Gather")
"""What is quantized; onnxruntime's quantizers take ONNX's attention for an older operator of that name."""


def quantize(source: Path, target: Path, scheme: Scheme) -> None:
    """Write the graph in `source` to `target` with the weights of matrix products and embeddings quantized.

    Of int8 each output channel has a scale, and weights use 7 bits: with 8 the sums of products overflow on processors
    without VNNI (onnxruntime's documentation of `reduce_range`). Raises `UserError` if onnxruntime is not installed.
    """
    with _quiet(), scratch_folder() as scratch:
        try:
            from onnxruntime.quantization import QuantType, quantize_dynamic
            from onnxruntime.quantization.shape_inference import quant_pre_process
        except ImportError as error:
            raise UserError(f'export: {scheme} needs {error.name}. Run: pip install "leanbert[compress]"') from None
        folded = scratch / "folded.onnx"  # transposed weights as constants: else the quantizers do not see them
        quant_pre_process(source, folded, skip_symbolic_shape=True)
        if scheme == "int8":
            quantize_dynamic(
                folded, target, OPERATORS, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
            )
        else:
            _quantize_int4(folded, target)


def quantize_plainly(source: Path, target: Path) -> None:
    """Write the graph in `source` to `target` as onnxruntime's dynamic quantization makes it where no more is set."""
    from onnxruntime.quantization import quantize_dynamic

    with _quiet():
        quantize_dynamic(source, target, OPERATORS)


def _quantize_int4(source: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph: Any = onnx.load(source)
    quantizer = MatMulNBitsQuantizer(
        graph, block_size=BLOCK, is_symmetric=True, op_types_to_quantize=OPERATORS,
        quant_axes=(("MatMul", 0), ("Gather", 1)), accuracy_level=4,
    )  # fmt: skip
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the quantizers log of each product."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
