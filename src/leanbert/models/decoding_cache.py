"""What decoding one more token needs of those before it, and of the sources: keys and values of all blocks.

Shapes: N sentences, K beams, Q = N * K hypotheses, S source tokens, P positions of the cache, V vocabulary, H heads, d
head size, D hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leanbert.models.attention import RotaryAngles, make_angles
from leanbert.models.decoder import DecoderBlock
from leanbert.models.kernels.attention import additive_mask, product_dtype
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.pointer import Source

if TYPE_CHECKING:
    from leanbert.models.seq2seq import Seq2SeqModel


class Cache:
    """Keys and values of targets and sources.

    The beams of a sentence share one list of P * K keys: number p * K + k is the key of beam k at position p. A
    mask says which of them a hypothesis has come from. So no key is ever copied when hypotheses change their beams, and
    the beams of a sentence are the rows of one matrix product.

    Args:
        model: The model.
        inputs: Sources, one a row, [N, S].
        beams: Hypotheses of each source.
        positions: Tokens of the longest output.

    """

    def __init__(self, model: Seq2SeqModel, inputs: PackedInputs, beams: int, positions: int) -> None:
        memory, real = model.encode(inputs), inputs.real
        self.model, self.beams, self.position = model, beams, 0
        self.source: Source | None = None  # to copy from
        if model.pointer is not None:
            self.source = model.pointer.read(memory, inputs.input_ids, real[:, None, :])
        self.cross_mask: Tensor | None = None
        if not bool(real.all()):
            self.cross_mask = additive_mask(real[:, None, None, :], memory)  # [N, 1, 1, S]
        self.own_mask: Tensor | None = None
        if beams > 1:  # [N, 1, K, P * K]
            shape = (len(memory), 1, beams, positions * beams)
            self.own_mask = torch.full(shape, float("-inf"), dtype=product_dtype(memory), device=memory.device)
        blocks: Any = model.decoder.blocks
        self.layers = [_Layer(block, memory, beams, positions) for block in blocks]

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits [Q, V] after the tokens [Q], float32."""
        decoder, used = self.model.decoder, (self.position + 1) * self.beams
        inputs = PackedInputs.whole_rows(tokens[:, None])  # [Q, 1]
        inputs = replace(inputs, position_ids=inputs.position_ids + self.position)
        hidden = decoder.embeddings(inputs, self.model.target_table)  # [Q, 1, D]
        angles = make_angles(decoder.config, inputs.position_ids[:1], hidden)
        hidden = hidden.view(-1, self.beams, hidden.shape[-1])  # [N, K, D]
        mask = None
        if self.own_mask is not None:
            self.own_mask[..., used - self.beams : used].diagonal(dim1=-2, dim2=-1).zero_()  # each sees itself
            mask = self.own_mask[..., :used]
        for layer in self.layers:
            hidden = layer.step(hidden, self.position, angles, mask, self.cross_mask)
        self.position += 1
        hidden = decoder.final_norm(hidden)
        pointer: Any = self.model.pointer
        copied = None if self.source is None else pointer(hidden, self.source)
        return self.model.logits(hidden, copied).flatten(0, 1).float()

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of each sentence go on from what was beam `parents[n, k]` (int64 [N, K])."""
        if self.own_mask is not None:
            used = self.own_mask[:, 0, :, : self.position * self.beams]  # [N, K, used]
            used.copy_(used.gather(1, parents[:, :, None].expand_as(used)))

    def select(self, sentences: Tensor) -> None:
        """Drop all sentences but these (int64, ascending)."""
        if self.own_mask is not None:
            self.own_mask = self.own_mask[sentences]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[sentences]
        if self.source is not None:
            self.source = self.source.select(sentences)
        for layer in self.layers:
            layer.select(sentences, self.position * self.beams)


class _Layer:
    """Keys and values of one block: of the target so far [N, H, P * K, d], and of the source [N, H, S, d]."""

    def __init__(self, block: DecoderBlock, memory: Tensor, beams: int, positions: int) -> None:
        self.block, self.beams = block, beams
        self.source_key, self.source_value = (x.contiguous() for x in block.cross_attention.project(memory))
        count, heads, _, size = self.source_key.shape
        self.key, self.value = (self.source_key.new_empty(count, heads, positions * beams, size) for _ in range(2))

    def step(
        self, hidden: Tensor, position: int, angles: RotaryAngles | None, own_mask: Tensor | None,
        cross_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Run the block on the newest tokens [N, K, D], whose keys and values are added; masks are added to scores."""
        attention, cross = self.block.attention, self.block.cross_attention
        before, used = position * self.beams, (position + 1) * self.beams

        def attend_to_target(x: Tensor) -> Tensor:
            query, self.key[:, :, before:used], self.value[:, :, before:used] = attention.project(x, angles)
            return attention.mix(query, self.key[:, :, :used], self.value[:, :, :used], own_mask)

        def attend_to_source(x: Tensor) -> Tensor:
            return cross(x, self.source_key, self.source_value, cross_mask)

        return self.block.run(hidden, attend_to_target, attend_to_source)

    def select(self, sentences: Tensor, used: int) -> None:
        """Keep these sentences, and what they have `used` of the target's positions."""
        self.source_key, self.source_value = self.source_key[sentences], self.source_value[sentences]
        for cache in (self.key, self.value):  # they move up
            cache[: len(sentences), :, :used] = cache[sentences, :, :used]
        self.key, self.value = self.key[: len(sentences)], self.value[: len(sentences)]
