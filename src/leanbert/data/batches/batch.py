"""What the loaders yield: rows of token ids with their documents and targets.

Letters: B rows, S row length, M targets per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

IGNORED = -100
"""Target of a slot that does not count."""

Kind = TypeVar("Kind", bound="Batch")


class Batch:
    """A dataclass of tensors whose first dimension is B, and of lists of B values that stay on the host.

    The first field is a tensor or a list of B. Lightning moves a batch with `to`, the loader pins it.
    """

    input_ids: Tensor

    def __len__(self) -> int:
        """Return B."""
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """Places for tokens, of sources and of targets."""
        return sum(value.numel() for name, value in vars(self).items() if name in ("input_ids", "decoder_ids"))

    def split(self: Kind, micro_batch: int) -> list[Kind]:
        """Cut into pieces of `micro_batch` rows, the last maybe smaller; the tensors' pieces are views."""
        parts = (slice(start, start + micro_batch) for start in range(0, len(self), micro_batch))
        return [type(self)(*(value[part] for value in self._values())) for part in parts]

    def to(self: Kind, device: torch.device | str, non_blocking: bool = False) -> Kind:
        """Return the batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Kind) -> Kind:
        """Return the batch in page-locked memory (the loader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self: Kind, function: Callable[[Tensor], Tensor]) -> Kind:
        return type(self)(*(function(value) if isinstance(value, Tensor) else value for value in self._values()))

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]


@dataclass
class MLMBatch(Batch):
    """One batch of packed rows for masked language modelling; every tensor is int64.

    `input_ids`, `position_ids` and `document_ids` are [B, S]: masked ids, the place inside the document's
    piece of the row, and the document's number in the row (-1: padding). `target_index` is [B, M]: places in
    the row to predict, ascending; `targets` is [B, M]: their original ids, -100 where a slot is unused.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    target_index: Tensor
    targets: Tensor


@dataclass
class LabelledBatch(Batch):
    """One batch of packed rows with labels at places in them: one for a text, or one for each of its words.

    `input_ids`, `position_ids`, `document_ids` (the example's number in the row, -1: padding) and `segment_ids` are
    int64 [B, S]; `target_index` is int64 [B, M], ascending in each row. `targets` is int64 [B, M], -100 where a slot is
    unused, or float32 [B, M, L] (several labels, or numbers), NaN where it is. Where words did not fit, `cut` has for
    each row the labels of such words by example.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    segment_ids: Tensor
    target_index: Tensor
    targets: Tensor
    cut: list[list[list[int]]] = field(default_factory=list)


@dataclass
class PairBatch(Batch):
    """One batch of packed rows of sources, and of the targets that belong to them; every tensor is int64.

    `input_ids`, `position_ids` and `document_ids` are [B, S] as in `MLMBatch`. `decoder_ids`, `decoder_position_ids`
    and `decoder_document_ids` are [B, T]: what the decoder reads; a target looks at the source with the same document's
    number. `targets` is [B, T]: the next ids, -100 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    decoder_ids: Tensor
    decoder_position_ids: Tensor
    decoder_document_ids: Tensor
    targets: Tensor


@dataclass
class PredictBatch(Batch):
    """Lines of text, one a row, padded to the longest of the batch; tensors are int64 [B, S].

    `document_ids` is 0 on the line's tokens and -1 on padding.
    """

    texts: list[str]
    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    segment_ids: Tensor


@dataclass
class WordBatch(Batch):
    """Sentences, one a row, padded to the longest of the batch; tensors are int64.

    `input_ids`, `position_ids`, `document_ids` (-1: padding) and `segment_ids` are [B, S]; `target_index` is [B, W]:
    the places of the words' first pieces; `targets` is [B, W]: 0 where there is a word, -100 where there is none.
    """

    sentences: list[Any]
    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    segment_ids: Tensor
    target_index: Tensor
    targets: Tensor
