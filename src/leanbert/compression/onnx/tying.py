"""A token embedding that is the output's matrix too stands in a file once, also where it is quantized.

Quantizers store what each node reads. Here the embedding reads the table of the product, whose rows and scales are
those of tokens. onnxruntime turns the table round when it opens the file, so that products take no longer.

Shapes: V vocabulary, D hidden, I ids of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

PLAIN, INTEGER, BLOCKS = "MatMul", "MatMulInteger", "MatMulNBits"
"""What a product is in 32 bits, in int8 and in int4."""
SUFFIXES = {PLAIN: "", INTEGER: "_quant", BLOCKS: "_Q4"}
"""What onnxruntime's quantizers put after its name."""


class Tied(NamedTuple):
    """The nodes, by name, of an embedding and of a product with the same table, turned round, and its width D."""

    embedding: str
    product: str
    width: int


class _Change(NamedTuple):
    once: Any
    """A node that onnxruntime computes when it opens the file."""
    instead: list[Any]
    """Nodes in place of the embedding's."""
    added: list[Any]
    removed: list[str]


def tied_nodes(graph: Any) -> list[Tied]:
    """Return the pairs of a graph that is not quantized."""
    from onnx import numpy_helper

    matrices = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 2}

    def reading(kind: str, place: int) -> list[tuple[str, np.ndarray]]:
        nodes = (node for node in graph.node if node.op_type == kind and node.input[place] in matrices)
        return [(node.name, matrices[node.input[place]]) for node in nodes]

    return [
        Tied(embedding, product, table.shape[1])
        for embedding, table in reading("Gather", 0)
        for product, matrix in reading(PLAIN, 1)
        if table.shape == matrix.shape[::-1] and np.array_equal(table, matrix.T)
    ]


def tie(graph: Any, pairs: Sequence[Tied]) -> None:
    """Let both nodes of each pair read one table, in a graph whose products are quantized and embeddings are not yet.

    Where a product is in 32 bits, its embedding stays so.
    """
    for pair in pairs:
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        nodes = {(node.name, node.op_type): node for node in graph.node}
        embedding = nodes[pair.embedding, "Gather"]
        names = ((pair.product + suffix, kind) for kind, suffix in SUFFIXES.items())
        product = next(nodes[name] for name in names if name in nodes)
        change = {PLAIN: _of_32_bits, INTEGER: _of_8_bits, BLOCKS: _of_4_bits}[product.op_type](
            embedding, product, tensors
        )
        others = list(graph.node)
        place = others.index(embedding)
        others[place : place + 1] = change.instead
        graph.ClearField("node")
        graph.node.extend([change.once, *others])
        graph.initializer.extend(change.added)
        for name in change.removed:
            graph.initializer.remove(tensors[name])


def _of_32_bits(embedding: Any, product: Any, tensors: dict[str, Any]) -> _Change:
    table, matrix = embedding.input[0], product.input[1]
    return _Change(_node(embedding, "Transpose", [table], matrix), [embedding], [], [matrix])


def _of_8_bits(embedding: Any, product: Any, tensors: dict[str, Any]) -> _Change:
    """Gather rows of int8 and their scales: [I, D]."""
    from onnx import TensorProto, numpy_helper

    (table, ids), output, matrix = embedding.input, embedding.output[0], product.input[1]
    turned = np.ascontiguousarray(numpy_helper.to_array(tensors[matrix]).T)  # int8 [V, D]
    rows, axis = (
        numpy_helper.from_array(value, f"{table}_{name}")
        for value, name in ((turned, "rows"), (np.array([-1]), "last_axis"))
    )
    numbers, factors = f"{output}_numbers", f"{output}_factors"
    instead = [
        _node(embedding, "Gather", [rows.name, ids], f"{numbers}_int8"),
        _node(embedding, "Cast", [f"{numbers}_int8"], numbers, to=TensorProto.FLOAT),
        _node(embedding, "Gather", [matrix.removesuffix("_quantized") + "_scale", ids], f"{factors}_flat"),  # [I]
        _node(embedding, "Unsqueeze", [f"{factors}_flat", axis.name], factors),
        _node(embedding, "Mul", [numbers, factors], output),
    ]
    return _Change(_node(embedding, "Transpose", [rows.name], matrix), instead, [rows, axis], [table, matrix])


def _of_4_bits(embedding: Any, product: Any, tensors: dict[str, Any]) -> _Change:
    """Gather rows out of uint8 [V, blocks, bytes], where a byte has two weights and 8 is zero: [I, D]."""
    from onnx import numpy_helper

    (table, ids), (_, blocks, scales) = embedding.input, product.input
    shape = numpy_helper.from_array(np.array([0, -1]), f"{table}_shape")
    size = next(attribute.i for attribute in product.attribute if attribute.name == "block_size")
    instead = _node(
        embedding, "GatherBlockQuantized", [f"{table}_rows", ids, scales], embedding.output[0], domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=size, bits=4,
    )  # fmt: skip
    return _Change(_node(embedding, "Reshape", [blocks, shape.name], f"{table}_rows"), [instead], [shape], [table])


def _node(embedding: Any, kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    """Return a node whose name begins with the embedding's layer."""
    from onnx import helper

    return helper.make_node(kind, inputs, [output], f"{embedding.name}/{output}", **attributes)
