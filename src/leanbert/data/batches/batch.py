"""What the loaders yield: rows of token ids with their documents and targets.

Letters: B rows, S row length, T length of the decoder's rows, M targets per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from leanbert.models.kernels.loss import IGNORED as IGNORED
from leanbert.models.packed_inputs import Documents, PackedInputs


@dataclass
class Batch:
    """What a model reads, tensors whose first dimension is B, and lists of B values that stay on the host.

    `row_numbers` says which training rows they are, whatever the epoch; elsewhere it is empty. Lightning moves a batch
    with `to`, the loader pins it.
    """

    inputs: PackedInputs
    row_numbers: list[int] = field(default_factory=list, kw_only=True)

    def __len__(self) -> int:
        """Return B."""
        return len(self.inputs)

    @property
    def tokens(self) -> int:
        """Places for tokens, of sources and of targets."""
        return sum(tensor.numel() for name, tensor in self.tensors().items() if name.endswith("input_ids"))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name; the names of the decoder's inputs begin with `decoder_`."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, PackedInputs):
                found |= {name.replace("inputs", part): tensor for part, tensor in value.tensors().items()}
            elif isinstance(value, Tensor):
                found[name] = value
        return found

    def split(self, micro_batch: int) -> list[Self]:
        """Cut into pieces of `micro_batch` rows, the last maybe smaller; the tensors' pieces are views."""
        starts = range(0, len(self), micro_batch)
        columns = [
            value.split(micro_batch)
            if isinstance(value, PackedInputs)
            else [value[start : start + micro_batch] for start in starts]
            for value in vars(self).values()
        ]
        return [type(self)(**dict(zip(vars(self), values, strict=True))) for values in zip(*columns, strict=True)]

    def delimited(self, find: Callable[[Tensor], Documents] = Documents.of) -> Self:
        """Return the batch with the documents of its rows: for devices that attend without a mask."""
        inputs: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, PackedInputs)}
        return replace(self, **{name: value.delimited(find) for name, value in inputs.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch on `device`. A copy to CUDA makes no host wait: Lightning asks that of tensors only."""
        waits = not non_blocking and torch.device(device).type != "cuda"
        return self._map(lambda tensor: tensor.to(device, non_blocking=not waits))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory (the loader calls this)."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        def moved(value: Any) -> Any:
            if isinstance(value, PackedInputs):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        return type(self)(**{name: moved(value) for name, value in vars(self).items()})


@dataclass
class MLMBatch(Batch):
    """One batch of packed rows for masked language modelling, with masked ids as inputs.

    `target_index` is int64 [B, M]: positions in the row to predict, ascending; `targets` is int64 [B, M]: their
    original ids, -100 where a slot is unused.
    """

    target_index: Tensor
    targets: Tensor


@dataclass
class LabelledBatch(Batch):
    """One batch of packed rows with labels at places in them: one for a text, or one for each of its words.

    `target_index` is int64 [B, M], ascending in each row. `targets` is int64 [B, M], -100 where a slot is unused, or
    float32 [B, M, L] (several labels, or numbers), NaN where it is. Where words did not fit, `cut` has for each row the
    labels of such words by example.
    """

    target_index: Tensor
    targets: Tensor
    cut: list[list[list[int]]] = field(default_factory=list)


@dataclass
class PairBatch(Batch):
    """One batch of packed rows of sources, and of the targets that belong to them.

    `decoder_inputs` are [B, T]: what the decoder reads; a target looks at the source with the same document's number.
    `targets` is int64 [B, T]: the next ids, -100 on padding.
    """

    decoder_inputs: PackedInputs
    targets: Tensor


@dataclass
class PredictBatch(Batch):
    """Lines of text, one a row, padded to the longest of the batch."""

    texts: list[str]


@dataclass
class WordBatch(Batch):
    """Sentences, one a row, padded to the longest of the batch.

    `target_index` is int64 [B, W]: the places of the words' first pieces; `targets` is int64 [B, W]: 0 where there is a
    word, -100 where there is none.
    """

    sentences: list[Any]
    target_index: Tensor
    targets: Tensor
