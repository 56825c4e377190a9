"""A tiny model, batches with unequal numbers of targets, and the plain task that trains on them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from leanbert.data.batches.batch import MLMBatch
from leanbert.models.config import EncoderConfig
from leanbert.models.packed_inputs import PackedInputs
from leanbert.pretrained.build import build_model

VOCABULARY = 100


def tiny_config(**changes) -> EncoderConfig:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 32}
    return EncoderConfig(**{**sizes, "dropout": 0.0, "attention_dropout": 0.0, **changes})


def tiny_model(dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build_model(tiny_config(**changes), VOCABULARY)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():  # the modern preset starts with zero output projections: make every path matter
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def unequal_batch(rows=8, length=16, targets=6, seed=0) -> MLMBatch:
    """Rows hold 1 to `targets` targets; two documents a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    cut = torch.randint(2, length - 2, (rows, 1), generator=generator)
    place = torch.arange(length).expand(rows, length)
    documents = (place >= cut).long()
    index = torch.stack([torch.randperm(length, generator=generator)[:targets].sort().values for _ in range(rows)])
    truth = ids.gather(1, index)
    used = torch.arange(targets)[None] <= (torch.arange(rows) % targets)[:, None]
    inputs = PackedInputs(ids.scatter(1, index, 4), place - cut * documents, documents)
    return MLMBatch(inputs, index, truth.masked_fill(~used, -100))


def whole_rows(ids, real=None, segments=None) -> PackedInputs:
    """Ids [B, S], one document a row; `real` (0 or 1, [B, S]) is 0 on padding."""
    inputs = PackedInputs.whole_rows(ids, segments)
    return inputs if real is None else replace(inputs, document_ids=real - 1)


class PlainTask:
    """`count_targets` and `loss_sum` over a bare module."""

    def __init__(self, module):
        self.module = module

    def count_targets(self, batch):
        return (batch.targets != -100).sum()

    def loss_sum(self, batch):
        logits = self.module(batch.inputs, batch.target_index)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")
