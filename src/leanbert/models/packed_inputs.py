"""What a model reads: rows of token ids, and to which document each token belongs.

Letters: B rows, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leanbert.slices import parts

BLOCK = 128
"""Queries that a kernel works on at a time: the longest document counts in such, for compiled code is made anew for
each number."""


class Documents(NamedTuple):
    """Where documents begin when rows are laid end to end, for attention without a mask; padding is one like others.

    `cu_seqlens` is int32 [N + 1]: the N begins, and the end. On the host are `max_seqlen`, which none is longer than;
    `length`, S; and `before`, the number of documents before each row, and of all. A token sees as many to its left and
    to its right as `window` says; -1: all.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    length: int
    before: tuple[int, ...]
    window: tuple[int, int] = (-1, -1)

    @classmethod
    def of(cls, document_ids: Tensor) -> Documents:
        """Return the documents of ids [B, S], of which values are read: on the host, in a loader."""
        begins = torch.ones_like(document_ids, dtype=torch.bool)
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        places = begins.flatten().nonzero().flatten()
        cu_seqlens = torch.cat((places, places.new_tensor([begins.numel()]))).int()
        before = (0, *begins.sum(1).cumsum(0).tolist())
        length, longest = begins.shape[1], int(cu_seqlens.diff().max())
        return cls(cu_seqlens, min(length, -(-longest // BLOCK) * BLOCK), length, before)

    @classmethod
    def whole_rows(cls, document_ids: Tensor) -> Documents:
        """Return rows [B, S] of one document each, whatever the ids are."""
        rows, length = document_ids.shape
        cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=document_ids.device) * length
        return cls(cu_seqlens, length, length, tuple(range(rows + 1)))

    def rows(self, part: slice) -> Documents:
        """Return those of consecutive rows; nothing is read back."""
        first, last = self.before[part.start], self.before[min(part.stop, len(self.before) - 1)]
        before = tuple(count - first for count in self.before[part.start : part.stop + 1])
        return self._replace(cu_seqlens=self.cu_seqlens[first : last + 1] - part.start * self.length, before=before)


@dataclass
class PackedInputs:
    """Rows of whole documents, one after the other; all tensors are int64 [B, S].

    `position_ids` begin at 0 in each document. Attention stays inside equal `document_ids`; -1 is padding, which sees
    only padding. `segment_ids`: None where all are 0. `documents`: where a device can make use of them.

    Not frozen: Lightning's plugins for 16 bits refuse a batch with a frozen dataclass in it.
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    segment_ids: Tensor | None = None
    documents: Documents | None = field(default=None, kw_only=True)

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
        """Return the tensors [B, S] by name; segments only where there are some."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def delimited(self, find: Callable[[Tensor], Documents] = Documents.of) -> PackedInputs:
        """Return the same with `documents`, found of the document ids."""
        return replace(self, documents=find(self.document_ids))

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedInputs:
        """Return what `function` makes of each tensor."""
        ends = self.documents and self.documents._replace(cu_seqlens=function(self.documents.cu_seqlens))
        return PackedInputs(**{name: function(tensor) for name, tensor in self.tensors().items()}, documents=ends)

    def split(self, micro_batch: int) -> list[PackedInputs]:
        """Cut into views of `micro_batch` rows, the last maybe smaller."""
        return [
            PackedInputs(
                **{name: tensor[part] for name, tensor in self.tensors().items()},
                documents=self.documents and self.documents.rows(part),
            )
            for part in parts(len(self), micro_batch)
        ]

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
            return pad_sequence(tensor[real].split(counts.tolist()), batch_first=True, padding_value=padding)

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
