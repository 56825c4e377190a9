"""A tiny sequence to sequence model, and batches of pairs for it."""

from __future__ import annotations

import numpy as np
import torch

from leanbert.data.batches.batch import PairBatch
from leanbert.data.batches.loading import pad_rows
from leanbert.data.batches.pairs import PairCollator
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.pretrained.build import build_model
from tests.tiny import VOCABULARY, tiny_config

BEGIN, END = 2, 3


def tiny_seq2seq(
    dtype=torch.float64, seed=0, layers=None, start="random", vocabulary=VOCABULARY, noise=0.05, targets=None,
    copy=False, **changes
):  # fmt: skip
    """`targets`: tokens of targets where they have a vocabulary of their own; `copy`: with a pointer."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build_model(
            tiny_config(**changes),
            vocabulary,
            lambda config: Seq2SeqModel(config, layers, start, target_vocab_size=targets, copy=copy),
        )
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():  # zero output projections would hide what blocks do
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def some_pairs(count=9, seed=0, vocabulary=VOCABULARY, longest=8, targets=None):
    """Sources and targets (below `targets`, else as sources) of 1 to `longest` tokens between begin and end."""
    chance = np.random.default_rng(seed)

    def text(below):
        return [BEGIN, *chance.integers(5, below, chance.integers(1, longest + 1)).tolist(), END]

    return [(text(vocabulary), text(targets or vocabulary)) for _ in range(count)]


def pack(rows, source_length, target_length) -> PairBatch:
    """Rows of pairs as a batch."""
    sides = ([[np.asarray(pair[side]) for pair in row] for row in rows] for side in (0, 1))
    return PairCollator((source_length, target_length), (0, 0)).collate(*sides)


def packed_batch(seed=0, targets=None) -> PairBatch:
    """Four rows of 1 to 3 pairs, with padding."""
    pairs = some_pairs(9, seed, targets=targets)
    return pack([pairs[:3], pairs[3:6], pairs[6:8], pairs[8:]], 32, 30)


def source_inputs(sources, extra=0) -> PackedInputs:
    """Sources to generate from, with `extra` places of padding more than needed."""
    ids, positions, documents = pad_rows([*sources, [0] * (max(map(len, sources)) + extra)], 0)
    tensors = [torch.from_numpy(array[:-1].copy()) for array in (ids, positions, documents)]
    return PackedInputs(*tensors)
