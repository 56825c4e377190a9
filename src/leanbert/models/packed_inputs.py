"""What a model reads: rows of token ids, and to which document each token belongs.

Letters: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
