"""What the loaders yield: rows of token ids with their documents and targets.

Letters: B rows, S row length, M targets per row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class MLMBatch:
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

    def __len__(self) -> int:
        """Return B."""
        return self.input_ids.shape[0]

    def split(self, micro_batch: int) -> list[MLMBatch]:
        """Cut into pieces of `micro_batch` rows, the last maybe smaller; the pieces are views."""
        pieces = zip(*(tensor.split(micro_batch) for tensor in self._tensors()), strict=True)
        return [MLMBatch(*piece) for piece in pieces]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MLMBatch:
        """Return the batch on `device`."""
        return MLMBatch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors()))

    def pin_memory(self) -> MLMBatch:
        """Return the batch in page-locked memory (the loader calls this)."""
        return MLMBatch(*(tensor.pin_memory() for tensor in self._tensors()))

    def _tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass
class PredictBatch:
    """Lines of text to fill, one line a row, padded to the longest of the batch; tensors are int64 [B, S].

    `document_ids` is 0 on the line's tokens and -1 on padding.
    """

    texts: list[str]
    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor

    def __len__(self) -> int:
        """Return B."""
        return len(self.texts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PredictBatch:
        """Return the batch on `device`."""
        tensors = (self.input_ids, self.position_ids, self.document_ids)
        return PredictBatch(self.texts, *(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))

    def pin_memory(self) -> PredictBatch:
        """Return the batch in page-locked memory (the loader calls this)."""
        tensors = (self.input_ids, self.position_ids, self.document_ids)
        return PredictBatch(self.texts, *(tensor.pin_memory() for tensor in tensors))
