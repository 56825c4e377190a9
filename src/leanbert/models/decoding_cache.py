"""What decoding one more token needs of those before it, and of the sources: keys and values of all blocks.

Shapes: N sentences, K beams, Q = N * K hypotheses, S source tokens, P places of the cache, V vocabulary, H heads, d
head size, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leanbert.models.attention import product_dtype, rotate
from leanbert.models.decoder import DecoderBlock
from leanbert.models.pointer import Source
from leanbert.models.seq2seq import Seq2SeqModel


class Cache:
    """Keys and values of targets and sources.

    The beams of a sentence share one list of P * K keys, that of beam k at place p being number p * K + k, and a mask
    says which of them a hypothesis has come from. So no key is ever copied when hypotheses change their beams, and the
    beams of a sentence are the rows of one matrix product.

    Args:
        model: The model.
        batch: Has `input_ids`, `position_ids` and `document_ids` (0 on tokens, -1 on padding), int64 [N, S].
        beams: Hypotheses of each source.
        places: Tokens of the longest output.

    """

    def __init__(self, model: Seq2SeqModel, batch: Any, beams: int, places: int) -> None:
        memory = model.encode(batch.input_ids, position_ids=batch.position_ids, document_ids=batch.document_ids)
        self.model, self.beams, self.place = model, beams, 0
        self.source: Source | None = None  # to copy from
        if model.pointer is not None:
            self.source = model.pointer.read(memory, batch.input_ids, (batch.document_ids >= 0)[:, None, :])
        self.table = model.target_table
        padding = (batch.document_ids < 0)[:, None, None, :]  # [N, 1, 1, S]
        dtype = product_dtype(memory)
        self.cross_mask: Tensor | None = None
        if bool(padding.any()):
            self.cross_mask = torch.zeros(padding.shape, dtype=dtype, device=memory.device)
            self.cross_mask.masked_fill_(padding, float("-inf"))
        self.own_mask: Tensor | None = None
        if beams > 1:  # [N, 1, K, P * K]
            shape = (len(memory), 1, beams, places * beams)
            self.own_mask = torch.full(shape, float("-inf"), dtype=dtype, device=memory.device)
        blocks: Any = model.decoder.blocks
        self.layers = [_Layer(block, memory, beams, places) for block in blocks]

    def step(self, tokens: Tensor) -> Tensor:
        """Return the logits [Q, V] after the tokens [Q], float32."""
        decoder, used = self.model.decoder, (self.place + 1) * self.beams
        positions = torch.full((1, 1), self.place, device=tokens.device)
        hidden = decoder.embeddings(tokens[:, None], positions, None, self.table)  # [Q, 1, D]
        angles = decoder.angles(positions, hidden)
        hidden = hidden.view(-1, self.beams, hidden.shape[-1])  # [N, K, D]
        mask = None
        if self.own_mask is not None:
            self.own_mask[..., used - self.beams : used].diagonal(dim1=-2, dim2=-1).zero_()  # each sees itself
            mask = self.own_mask[..., :used]
        for layer in self.layers:
            hidden = layer.step(hidden, self.place, angles, mask, self.cross_mask)
        self.place += 1
        if decoder.final_norm is not None:
            hidden = decoder.final_norm(hidden)
        pointer: Any = self.model.pointer
        copied = None if self.source is None else pointer(hidden, self.source)
        return self.model.logits(hidden, copied).flatten(0, 1).float()

    def reorder(self, parents: Tensor) -> None:
        """Let beam k of each sentence go on from what was beam `parents[n, k]` (int64 [N, K])."""
        if self.own_mask is not None:
            used = self.own_mask[:, 0, :, : self.place * self.beams]  # [N, K, used]
            used.copy_(used.gather(1, parents[:, :, None].expand_as(used)))

    def keep(self, sentences: Tensor) -> None:
        """Drop all sentences but these (int64, ascending)."""
        if self.own_mask is not None:
            self.own_mask = self.own_mask[sentences]
        if self.cross_mask is not None:
            self.cross_mask = self.cross_mask[sentences]
        if self.source is not None:
            self.source = self.source.keep(sentences)
        for layer in self.layers:
            layer.keep(sentences, self.place * self.beams)


class _Layer:
    """Keys and values of one block: of the target so far [N, H, P * K, d], and of the source [N, H, S, d]."""

    def __init__(self, block: DecoderBlock, memory: Tensor, beams: int, places: int) -> None:
        self.block, self.beams = block, beams
        self.source_key, self.source_value = (x.contiguous() for x in block.cross_attention.project(memory))
        count, heads, _, size = self.source_key.shape
        self.key, self.value = (self.source_key.new_empty(count, heads, places * beams, size) for _ in range(2))

    def step(
        self, hidden: Tensor, place: int, angles: Any, own_mask: Tensor | None, cross_mask: Tensor | None
    ) -> Tensor:
        """Run the block on the newest tokens [N, K, D]; the masks are added to the scores."""
        cross: Any = self.block.cross_attention

        def look(x: Tensor) -> Tensor:
            query = cross.query(x).unflatten(-1, (cross.num_heads, -1)).transpose(1, 2)  # [N, H, K, d]
            mixed = F.scaled_dot_product_attention(query, self.source_key, self.source_value, cross_mask)
            return cross.output(mixed.transpose(1, 2).flatten(2))

        return self.block.run(hidden, lambda x: self._attend(x, place, angles, own_mask), look)

    def keep(self, sentences: Tensor, used: int) -> None:
        """Keep these sentences, and what they have `used` of the target's places."""
        self.source_key, self.source_value = self.source_key[sentences], self.source_value[sentences]
        for cache in (self.key, self.value):  # they move up
            cache[: len(sentences), :, :used] = cache[sentences, :, :used]
        self.key, self.value = self.key[: len(sentences)], self.value[: len(sentences)]

    def _attend(self, hidden: Tensor, place: int, angles: Any, mask: Tensor | None) -> Tensor:
        """Self-attention of the newest tokens [N, K, D], whose keys and values are added at `place`."""
        attention: Any = self.block.attention
        fused = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1))  # [N, K, 3, H, d]
        query_key, value = fused.split((2, 1), dim=2)
        if angles is not None:
            query_key = rotate(query_key, angles)
        query, key = query_key.transpose(1, 3).unbind(2)  # [N, H, K, d]
        before, used = place * self.beams, (place + 1) * self.beams
        self.key[:, :, before:used] = key
        self.value[:, :, before:used] = value.squeeze(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, self.key[:, :, :used], self.value[:, :, :used], mask)
        return attention.output(mixed.transpose(1, 2).flatten(2))
