"""What a model computes as graphs of plain tensors, and how they are written as ONNX.

Shapes: B batch, S source tokens, T target tokens, P target tokens before them, D hidden, L labels, V vocabulary, H
heads, d head size.
"""

from __future__ import annotations

import ast
import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanbert.compression.onnx.fused import GraphContext, fuse, make_turns
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.classifier import Classifier
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.pointer import Source
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata, describe

MODEL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
"""Names of files: a whole model, or the halves of one for sequence to sequence."""

OPSET = 23
"""Version of the operators; the first with attention and rotary positions as one operator each."""

KEY = "leanbert"
"""Under which a file says, as JSON, what model it is."""

PAST, PRESENT = ("past_keys", "past_values"), ("keys", "values")
"""What a decoder takes of the targets before, and gives for its next call, of each block."""

MOST_BYTES = 2**31 - 2**24
"""Of one file: protobuf counts bytes with 31 bits."""


class EncoderGraph(nn.Module):
    """All of a model, or the part of a sequence-to-sequence model that runs once for each source.

    Takes int64 [B, S]: `input_ids`; `attention_mask`, 1 at tokens and 0 at padding; `token_type_ids` where the model
    has segments. Gives `logits`, of texts [B, L], of words [B, S, L], of masked tokens [B, S, V], and
    `last_hidden_state` [B, S, D]. Before a decoder instead of logits: `cross_keys_0`, `cross_values_0` and so on, of
    each of its blocks [B, S, H * d], and `pointer_keys` [B, S, D] if tokens can be copied.
    """

    def __init__(self, model: EncoderModel) -> None:
        super().__init__()
        self.model: Any = model
        segments = model.config.type_vocab_size > 0 and not isinstance(model, Seq2SeqModel)
        self.inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if segments else ()))
        self.outputs: tuple[str, ...] = ("logits", "last_hidden_state")
        if isinstance(model, Seq2SeqModel):
            self.outputs = ("last_hidden_state", *_by_block(model, "cross_keys", "cross_values"))
            if model.pointer is not None:
                self.outputs += ("pointer_keys",)

    def examples(self) -> tuple[Tensor, ...]:
        """Return inputs of two rows, of which the first is shorter."""
        ids = torch.zeros(2, _some(self.model, 5), dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        return (ids, mask, torch.zeros_like(ids))[: len(self.inputs)]

    def axes(self) -> list[dict[int, Any]]:
        """Return the axes of each input that differ from call to call."""
        length = torch.export.Dim("length", min=1, max=self.model.config.max_positions)
        return [{0: torch.export.Dim("batch", min=1), 1: length} for _ in self.inputs]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Return the outputs in their order."""
        model = self.model
        inputs = PackedInputs.whole_rows(input_ids, token_type_ids)
        hidden = model.encode(replace(inputs, document_ids=attention_mask - 1))  # [B, S, D]
        if isinstance(model, Seq2SeqModel):
            cross = [part for block in model.decoder.blocks for part in block.cross_attention.project(hidden)]  # type: ignore[operator, union-attr]
            return (hidden, *cross, *(() if model.pointer is None else (model.pointer.key(hidden),)))
        if isinstance(model, Classifier):
            return model.head(hidden[:, 0] if model.of == "text" else hidden), hidden
        return model.head(hidden, model.encoder.embeddings.token.weight), hidden


class DecoderGraph(nn.Module):
    """The part of a sequence-to-sequence model that runs for each next token.

    Takes `input_ids`, int64 [B, T]; of the source `attention_mask`, int64 [B, S], and what the other graph gives:
    `cross_keys_0`, `cross_values_0` and so on, and with `pointer_keys` the sources' `source_ids`, int64 [B, S]; and of
    the targets before `past_keys_0`, `past_values_0` and so on, [B, H, P, d], where P is 0 at first. Gives `logits`
    [B, T, V] of the next tokens, and `keys_0`, `values_0` and so on, [B, H, P + T, d], the next call's past.
    """

    def __init__(self, model: Seq2SeqModel) -> None:
        super().__init__()
        self.model = model
        self.inputs: tuple[str, ...] = ("input_ids", "attention_mask")
        self.inputs += _by_block(model, "cross_keys", "cross_values") + _by_block(model, *PAST)
        if model.pointer is not None:
            self.inputs += ("pointer_keys", "source_ids")
        self.outputs = ("logits", *_by_block(model, *PRESENT))

    def examples(self) -> tuple[Any, ...]:
        """Return inputs of two rows, of which the first source is shorter."""
        config, count = self.model.config, 2 * len(self.model.decoder.blocks)
        ids, mask, *_ = EncoderGraph(self.model).examples()
        heads, size = config.num_heads, config.head_size
        cross = [torch.zeros(*ids.shape, heads * size) for _ in range(count)]  # one twice is one
        past = [torch.zeros(2, heads, _some(self.model, 3), size) for _ in range(count)]
        targets = torch.zeros(2, _some(self.model, 4), dtype=torch.int64)
        pointer = (torch.zeros(*ids.shape, config.hidden_size), ids)
        return (targets, mask, cross, past, *(() if self.model.pointer is None else pointer))

    def axes(self) -> list[Any]:
        """Return the axes of each input that differ from call to call."""
        most, count = self.model.config.max_positions, 2 * len(self.model.decoder.blocks)
        batch, source, target = (
            torch.export.Dim(name, min=1, max=limit)
            for name, limit in (("batch", None), ("source", most), ("target", most))
        )
        past = torch.export.Dim("past", min=0, max=most)
        tokens = {0: batch, 1: source}
        pointer = [] if self.model.pointer is None else [tokens, tokens]
        return [{0: batch, 1: target}, tokens, [tokens] * count, [{0: batch, 2: past}] * count, *pointer]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, cross: list[Tensor], past: list[Tensor],
        pointer_keys: Tensor | None = None, source_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Return the outputs in their order; `cross` and `past` are keys and values block by block."""
        decoder, before, (rows, length) = self.model.decoder, past[0].shape[2], input_ids.shape
        inputs = PackedInputs.whole_rows(input_ids)
        inputs = replace(inputs, position_ids=inputs.position_ids + before)
        hidden = decoder.embeddings(inputs, self.model.target_table)  # [B, T, D]
        every = torch.arange(before + length, device=hidden.device)  # [P + T]
        own = every[before:]
        context = GraphContext((own[:, None] >= every)[None, None], make_turns(decoder.config, own, rows))
        real = attention_mask > 0  # [B, S]
        there = real[:, None, None].expand(-1, -1, length, -1)  # [B, 1, T, S]
        present: list[Tensor] = []
        for block, source, target in zip(decoder.blocks, _pairs(cross), _pairs(past), strict=True):

            def attend(x: Tensor, attention: Any = block.attention, past: tuple[Tensor, ...] = target) -> Tensor:
                mixed, *extended = attention.extend(x, context, *past)
                present.extend(extended)
                return mixed

            def attend_to_source(x: Tensor, cross: Any = block.cross_attention, source: Any = source) -> Tensor:
                return cross(x, *source, there)

            hidden = block.run(hidden, attend, attend_to_source)  # type: ignore[operator]
        hidden = decoder.final_norm(hidden)
        copied = None
        if self.model.pointer is not None and pointer_keys is not None and source_ids is not None:
            copied = self.model.pointer(hidden, Source(pointer_keys, source_ids, real[:, None, :]))
        return self.model.logits(hidden, copied), *present


def graphs_of(model: EncoderModel) -> dict[str, EncoderGraph | DecoderGraph]:
    """Return the graphs of a model by the names of their files; it stays as it is, and they share its weights."""
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    fuse(model)
    if not isinstance(model, Seq2SeqModel):
        return {MODEL: EncoderGraph(model)}
    return {ENCODER: EncoderGraph(model), DECODER: DecoderGraph(model)}


def write_graph(graph: EncoderGraph | DecoderGraph, path: Path, metadata: ModelMetadata) -> None:
    """Write a graph, and what model it is, to `path`.

    Raises `UserError` where the exporter is not installed or the model is larger than such a file.
    """
    size = sum(parameter.nbytes for parameter in graph.parameters())
    if size > MOST_BYTES:
        raise UserError(f"{path}: the model has {size / 1e9:.1f} GB, a file of this format 2 at most. Export with hf")
    with quiet():
        program = torch.onnx.export(
            graph.eval(), graph.examples(), dynamo=True, dynamic_shapes=tuple(graph.axes()), opset_version=OPSET,
            input_names=graph.inputs, output_names=graph.outputs, verbose=False,
        )  # fmt: skip
    assert program is not None
    _name_nodes(program.model.graph)
    program.model.metadata_props[KEY] = json.dumps(describe(graph.model.config, metadata))
    program.save(path)


def layer_of(node: str) -> str:
    """Return the layer that a node of a written graph computes, by its name."""
    return node.partition("/")[0]


def _name_nodes(graph: Any) -> None:
    """Put before the name of each node that of its layer: the module that it is in, or whose embedding it reads.

    Names outlast what is done to graphs afterwards, other remarks do not, and these, among them paths of this machine,
    are left out. A product with the token embedding is of the head that computes it.
    """
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        read = node.inputs[0] if node.op_type == "Gather" else None
        if read is not None and read.name.endswith(".weight"):
            scopes = [read.name.removesuffix(".weight"), node.name]
        if len(scopes) > 1 and (layer := scopes[-2].removeprefix("model.")):
            node.name = f"{layer}/{node.name}"
        node.metadata_props.clear()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporter and quantizers say of each product and of what they do not need; without gradients."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UserError(f'export: ONNX needs {error.name}. Run: pip install "leanbert[compress]"') from None
    finally:
        logging.disable(logging.NOTSET)


def _by_block(model: Seq2SeqModel, *names: str) -> tuple[str, ...]:
    """Return the names with the number of each block of the decoder."""
    return tuple(f"{name}_{block}" for block in range(len(model.decoder.blocks)) for name in names)


def _pairs(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return keys with their values."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def _some(model: EncoderModel, length: int) -> int:
    """Return a length that the model has positions for; the exporter takes 1 for a constant."""
    return max(2, min(length, model.config.max_positions))
