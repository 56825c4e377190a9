"""What the models of all tasks have in common: an encoder, and what the memory techniques need to know of it.

Shapes: B batch, S sequence, M targets per row, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanbert.models.config import ResolvedConfig
from leanbert.models.decoder import DecoderBlock
from leanbert.models.encoder import Block, Encoder, Stack
from leanbert.models.heads import MaskedLMHead
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import ModelMetadata, Stored
from leanbert.models.unit import Unit

ENCODER = "encoder."
"""Prefix of the encoder's weights."""


def gather_rows(hidden: Tensor, target_index: Tensor) -> Tensor:
    """Pick positions `target_index` (int64 [B, M]) of each row of `hidden` [B, S, D]: [B, M, D]."""
    rows, length, width = hidden.shape
    offset = torch.arange(rows, device=hidden.device)[:, None] * length  # [B, 1]
    flat = (target_index + offset).flatten()  # [B * M]
    return hidden.reshape(rows * length, width).index_select(0, flat).view(rows, -1, width)


class EncoderModel(Unit):
    """An encoder with a head of its task.

    `task` is the name of the task that trains it. `head_chunk`: targets whose scores exist at a time in training; None:
    all.
    """

    task: str

    def __init__(self, config: ResolvedConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head_chunk: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model computes; its shards may be in host memory."""
        weight = self.encoder.embeddings.token.weight
        return torch.device(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight.device

    @property
    def num_parameters(self) -> int:
        """Parameters as published and exported, shared ones once: without the padding rows of the vocabulary."""
        padding = sum((len(table) - tokens) * table.shape[1] for table, tokens in self.token_tables)
        if isinstance(head := getattr(self, "head", None), MaskedLMHead):
            padding += len(head.bias) - head.vocab_size
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    @property
    def token_tables(self) -> list[tuple[Tensor, int]]:
        """The token embeddings, [R, D] each, and how many of their rows are tokens."""
        return [(self.encoder.embeddings.token.weight, self.config.vocab_size or 0)]

    @property
    def stacks(self) -> list[Stack]:
        """All stacks of blocks, in the order in which they run: what activations are stored of elsewhere."""
        return [self.encoder]

    @property
    def blocks(self) -> list[Block | DecoderBlock]:
        """All blocks, in the order in which they run: what is checkpointed, sliced, compiled, sharded and pruned."""
        return [block for stack in self.stacks for block in stack.blocks]  # type: ignore[misc]

    @property
    def output_weights(self) -> list[Tensor]:
        """What `logits` reads: the weights that are of no stack, and the token embedding that is tied to a head."""
        of_stacks = {weight for stack in self.stacks for weight in stack.parameters()}
        tied = [self.token_tables[-1][0]] if isinstance(getattr(self, "head", None), MaskedLMHead) else []
        return [*(weight for weight in self.parameters() if weight not in of_stacks), *tied]

    def check_sharing(self) -> None:
        """Raise `UserError` if modules that are shared are not those that a new model of this depth shares."""

    def inherits(self, name: str, metadata: ModelMetadata) -> bool:
        """Whether weight `name` of a stored model is taken over when training starts from it."""
        return metadata.task == self.task or name.startswith(ENCODER)

    def check_stored(self, stored: Stored, state: Mapping[str, Tensor]) -> None:
        """Raise `UserError` if a stored model of the same task, whose weights are `state`, is made otherwise."""

    def warm_start(self) -> None:
        """Start what the model has besides the encoder, which comes from a model of another task."""

    def encode(self, inputs: PackedInputs, target_index: Tensor | None = None) -> Tensor:
        """Hidden states [B, M, D] at `target_index` (int64 [B, M], positions inside each row), else [B, S, D]."""
        hidden = self.encoder(inputs)
        return hidden if target_index is None else gather_rows(hidden, target_index)

    def hidden(self, inputs: PackedInputs, target_index: Any = None) -> tuple[Tensor, Any]:
        """Return what `logits` takes: hidden states as `encode`, and of some models more."""
        return self.encode(inputs, target_index), None

    def logits(self, hidden: Tensor, copied: Any = None) -> Tensor:
        """Return scores [B, M, L] of what `hidden` returns."""
        raise NotImplementedError

    def forward(self, inputs: PackedInputs, target_index: Any = None) -> Tensor:
        """Scores [B, M, L] at `target_index` (int64 [B, M], positions inside each row), else [B, S, L]."""
        return self.logits(*self.hidden(inputs, target_index))
