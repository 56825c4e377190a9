"""ONNX files with weights in 8 or 4 bits, by onnxruntime's own quantizers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from leanbert.compression.onnx.graphs import DECODER, layer_of, quiet
from leanbert.compression.onnx.runtime import Session, input_feed, read_onnx
from leanbert.compression.onnx.tying import tie, tied_nodes
from leanbert.errors import UserError
from leanbert.files import scratch_folder
from leanbert.models.packed_inputs import PackedInputs

Scheme = Literal["int8", "int4", "int8_int4", "int8_static"]
"""int8: matrix products of 8-bit weights and activations, which are scaled in each call (dynamic quantization).
int4: weights of 4 bits in blocks, products in higher precision.
int8_int4: products as of int8, embedding tables, which are much of a small model's file, as of int4.
int8_static: as int8, with scales of activations from what was seen on real data."""

STATIC: Scheme = "int8_static"

Seen = tuple[PackedInputs, ...]
"""What a model has read: rows of one document each, and where it has a decoder the targets of these, in their order."""

SCHEMES = get_args(Scheme)

BLOCK = 32
"""4-bit weights that share a scale; as many as onnxruntime's fastest kernels want at least."""

PRODUCT, TABLE = OPERATORS = ("MatMul", "Gather")
"""What is quantized; onnxruntime's quantizers take ONNX's attention for an older operator of that name."""

GEMM, FLOAT = "Gemm", 1
"""Names of ONNX: a product of two matrices with what is added, and the type of 32-bit numbers."""


def quantize(
    source: Path, target: Path, scheme: Scheme, exceptions: Sequence[str] = (), seen: Sequence[Seen] = ()
) -> None:
    """Write the graphs in the folder `source` to `target` with the weights of products and embeddings quantized.

    Of int8 each output channel has a scale, and weights use 7 bits: with 8 the sums of products overflow on processors
    without VNNI (onnxruntime's documentation of `reduce_range`). The layers in `exceptions`, by the names of their
    modules such as `encoder.blocks.0.attention.qkv`, stay in 32 bits. Of what was `seen` int8_static takes the
    ranges of activations.

    Raises:
        UserError: onnxruntime is not installed; an exception is no layer that is quantized, or nothing else is.

    """
    with scratch_folder() as folded:
        fold(source, folded)
        if exceptions:
            check_exceptions(exceptions, layers_of(folded, scheme), scheme)
        quantize_folded(folded, target, scheme, exceptions, seen)


def fold(source: Path, target: Path) -> None:
    """Write the graphs in a folder with transposed weights as constants: else the quantizers do not see them."""
    try:
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise UserError(f'export: quantization needs {error.name}. Run: pip install "leanbert[compress]"') from None
    with quiet():
        for file in source.glob("*.onnx"):
            quant_pre_process(file, target / file.name, skip_symbolic_shape=True)


def layers_of(folded: Path, scheme: Scheme) -> list[str]:
    """Return the names of the layers of which weights are quantized, as they are written in the graphs."""
    import onnx

    files = folded.glob("*.onnx")
    return sorted({layer_of(node) for file in files for node in _quantized_nodes(onnx.load(file).graph, scheme)})


def check_exceptions(exceptions: Sequence[str], layers: Sequence[str], scheme: Scheme) -> None:
    """Raise `UserError` for a name that is not one of `layers`, and where none of these is left."""
    for name in exceptions:
        if name not in layers:
            nearest = ", ".join(difflib.get_close_matches(name, layers, cutoff=0.0))
            raise UserError(f"exceptions: {name!r} is no layer that {scheme} quantizes. The nearest are {nearest}")
    if not set(layers) - set(exceptions):
        raise UserError(f"exceptions: they are all layers, of which {scheme} would quantize none. Leave some out")


def quantize_folded(
    folded: Path, target: Path, scheme: Scheme, exceptions: Collection[str] = (), seen: Sequence[Seen] = ()
) -> None:
    """Do what `quantize` does with graphs that `fold` has written, and with exceptions that are layers."""
    import onnx

    with quiet():
        for file in folded.glob("*.onnx"):
            graph: Any = onnx.load(file)
            kept = [node for node in _quantized_nodes(graph.graph, scheme) if layer_of(node) in exceptions]
            tied = [
                pair for pair in tied_nodes(graph.graph)
                if scheme != STATIC and (pair.embedding in kept) == (pair.product in kept)
                and (scheme != "int4" or pair.width % BLOCK == 0)
            ]  # fmt: skip
            kept += [pair.embedding for pair in tied]
            match scheme:
                case "int8":
                    _quantize_int8(file, target / file.name, kept)
                case "int4":
                    _quantize_int4(graph, target / file.name, kept)
                case "int8_int4":  # in this order: int8 asks for types, which cannot be inferred past int4's operators
                    _quantize_int8(file, target / file.name, kept, (PRODUCT,))
                    _quantize_int4(onnx.load(target / file.name), target / file.name, kept, (TABLE,))
                case "int8_static":
                    _quantize_int8(file, target / file.name, kept, (TABLE,))
                    _quantize_static(target / file.name, kept, _feeds(folded, file.name, seen))
            model: Any = onnx.load(target / file.name)
            tie(model.graph, tied)
            model.graph.ClearField("value_info")  # shapes that quantizers have noted, and nobody reads
            onnx.save(model, target / file.name)


def _quantized_nodes(graph: Any, scheme: Scheme) -> list[str]:
    """Return the names of the nodes whose matrix is quantized: in int8 also `Gemm`, which becomes a `MatMul`."""
    operators = OPERATORS if scheme == "int4" else (*OPERATORS, GEMM)
    matrices = {tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT and len(tensor.dims) == 2}
    return [node.name for node in graph.node if node.op_type in operators and matrices.intersection(node.input)]


def quantize_plainly(source: Path, target: Path) -> None:
    """Write the graph in `source` to `target` as onnxruntime's dynamic quantization makes it where no more is set."""
    from onnxruntime.quantization import quantize_dynamic

    with quiet():
        quantize_dynamic(source, target, OPERATORS)


def _quantize_int8(source: Path, target: Path, kept: list[str], operators: Sequence[str] = OPERATORS) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    renamed = [f"{node}_MatMul" for node in kept]  # what a `Gemm` is called when it has become one
    quantize_dynamic(
        source, target, operators, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True,
        nodes_to_exclude=kept + renamed,
    )  # fmt: skip


def _feeds(folder: Path, file: str, seen: Sequence[Seen]) -> Iterator[dict[str, Tensor]]:
    """Yield what the graph in a file of the folder reads of what was seen, by name."""
    if file != DECODER:
        yield from (input_feed(rows[0]) for rows in seen)
        return
    model: Any = read_onnx(folder)
    for sources, targets in seen:
        yield model.start_decoding(sources, 1, targets.input_ids.shape[1]).feed(targets.input_ids)


def _quantize_static(path: Path, kept: list[str], feeds: Iterator[dict[str, Tensor]]) -> None:
    """Quantize the products of a graph, in place, with the least and largest number that each reads of the `feeds`.

    What a product reads others read too, such as the next residual, and the quantizer would have them read it rounded.
    So products get it under a name of their own.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            names = Session(path).inputs
            self._left = ({name: feed[name].numpy() for name in names} for feed in feeds)

        def get_next(self) -> Any:
            return next(self._left, None)

    model, products = onnx.load(path), [PRODUCT, GEMM]
    quantized, nodes, own = {*_quantized_nodes(model.graph, STATIC)} - {*kept}, [], {}
    for node in model.graph.node:
        if node.name in quantized and node.op_type in products:
            read = node.input[0]
            if read not in own:
                own[read] = f"{read}_of_products"
                nodes.append(onnx.helper.make_node("Identity", [read], [own[read]], f"{node.name}_reads"))
            node.input[0] = own[read]
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    quantize_static(
        path, path, Rows(), op_types_to_quantize=products, per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=kept,
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": products},
    )  # fmt: skip


def _quantize_int4(graph: Any, target: Path, kept: list[str], operators: Sequence[str] = OPERATORS) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        graph, block_size=BLOCK, is_symmetric=True, op_types_to_quantize=tuple(operators),
        quant_axes=((PRODUCT, 0), (TABLE, 1)), accuracy_level=4, nodes_to_exclude=kept,
    )  # fmt: skip
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), False)
