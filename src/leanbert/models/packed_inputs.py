"""What a model reads: rows of token ids, and to which document each token belongs.

Letters: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass
class PackedInputs:
    """Rows of whole documents, one after the other; all tensors are int64 [B, S].

    `position_ids` begin at 0 in each document. Attention stays inside equal `document_ids`; -1 is padding, which sees
    only padding. `segment_ids`: None where all are 0.

    Not frozen: Lightning's plugins for 16 bits refuse a batch with a frozen dataclass in it.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    segment_ids: Tensor | None = None

    @classmethod
    def whole_rows(cls, input_ids: Tensor, segment_ids: Tensor | None = None) -> PackedInputs:
        """Return rows of one document each."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return cls(input_ids, positions, torch.zeros_like(input_ids), segment_ids)

    @classmethod
    def from_arrays(cls, *arrays: np.ndarray) -> PackedInputs:
        """Return ids, positions, document ids and, where there are some, segments, int64 [B, S] each."""
        return cls(*map(torch.from_numpy, arrays))

    def __len__(self) -> int:
        """Return B."""
        return len(self.input_ids)

    @property
    def real(self) -> Tensor:
        """Where there are tokens, not padding: bool [B, S]."""
        return self.document_ids >= 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name; segments only where there are some."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedInputs:
        """Return what `function` makes of each tensor."""
        return PackedInputs(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def split(self, micro_batch: int) -> list[PackedInputs]:
        """Cut into views of `micro_batch` rows, the last maybe smaller."""
        starts = range(0, len(self), micro_batch)
        return [self.map(lambda tensor, start=start: tensor[start : start + micro_batch]) for start in starts]  # type: ignore[misc]

    def unpacked(self) -> Unpacked:
        """Return each document as a row of its own, in their order; there must be one."""
        if not self.document_ids.any():  # as they are already
            row = torch.arange(len(self), device=self.document_ids.device)[:, None]
            return Unpacked(self, row.expand_as(self.input_ids), self.position_ids)
        real = self.real
        row = torch.arange(len(self), device=real.device)[:, None] * (self.document_ids.max() + 1)
        _, number, counts = torch.unique_consecutive(
            (row + self.document_ids)[real], return_inverse=True, return_counts=True
        )
        place = torch.arange(len(number), device=real.device) - (counts.cumsum(0) - counts)[number]

        def documents(tensor: Tensor, padding: int = 0) -> Tensor:
            rows = tensor.new_full((len(counts), int(counts.max())), padding)
            rows[number, place] = tensor[real]
            return rows

        def packed(values: Tensor) -> Tensor:
            return torch.zeros_like(self.input_ids).masked_scatter(real, values)

        segments = None if self.segment_ids is None else documents(self.segment_ids)
        alone = documents(torch.zeros_like(self.document_ids), padding=-1)
        inputs = PackedInputs(documents(self.input_ids), documents(self.position_ids), alone, segments)
        return Unpacked(inputs, packed(number), packed(place))


class Unpacked(NamedTuple):
    """Documents as rows of their own, and for each place of the packed rows where it is in them.

    `row` and `place` are int64 [B, S]; padding is said to be at 0, 0.
    """

    inputs: PackedInputs
    row: Tensor
    place: Tensor
