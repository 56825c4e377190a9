from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.measure.trace import LiveBytes
from leanbert.memory.layer_major import run_in_slices
from leanbert.models.kernels.loss import linear_cross_entropy_sum
from leanbert.slices import parts, rounds, times


def test_parts_cover_all_and_the_last_is_smaller():
    assert parts(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert parts(0, 3) == []


def test_real_tensors_go_through_every_round():
    assert [(item, times()) for item in rounds(range(6), torch.zeros(1))] == [(item, 1) for item in range(6)]


def test_of_fake_tensors_the_second_round_stands_for_those_between():
    with FakeTensorMode():
        like = torch.zeros(1)
    assert [(item, times()) for item in rounds(range(6), like)] == [(0, 1), (1, 4), (5, 1)]
    assert [item for item in rounds(range(3), like)] == [0, 1, 2]
    outer = [(times(), [times() for _ in rounds(range(5), like)]) for _ in rounds(range(4), like)]
    assert outer == [(1, [1, 3, 1]), (2, [2, 6, 2]), (1, [1, 3, 1])]


def head(dtype: torch.dtype) -> LiveBytes:
    """Trace a chunked head: 40 targets in chunks of 4, each with several blocks of the vocabulary's gradient."""
    model = nn.Linear(64, 70_000, dtype=dtype)
    hidden = torch.zeros(40, 64, dtype=dtype, requires_grad=True)
    targets = torch.zeros(40, dtype=torch.int64)
    with LiveBytes(model, existing=[hidden, targets]) as trace:
        loss = linear_cross_entropy_sum(hidden, model.weight, model.bias, targets, vocab_size=70_000, chunk=4)
        loss.backward()
    return trace


def blocks() -> LiveBytes:
    """Trace layer-major execution of two blocks over 11 rows, two at a time."""

    class Block(nn.Linear):
        def forward(self, hidden, context):
            return super().forward(hidden).tanh()

    model = nn.Sequential(Block(16, 16), Block(16, 16))
    hidden = torch.zeros(11, 8, 16, requires_grad=True)
    with LiveBytes(model, existing=[hidden]) as trace:
        out = hidden
        for block in model:
            out = run_in_slices(block, out, None, 2)
        out.sum().backward()
    return trace


@pytest.mark.parametrize("traced", [lambda: head(torch.float32), lambda: head(torch.bfloat16), blocks])
def test_fewer_rounds_have_the_same_peak_and_count_the_same_operations(traced, monkeypatch):
    with FakeTensorMode():
        few = traced()
        monkeypatch.setattr("leanbert.slices.FakeTensor", int)  # now they count as real
        all_of_them = traced()
    assert few.flops == all_of_them.flops
    # a chunk leaves its loss behind, one number of 4 bytes: that of 7 chunks is missing
    assert 0 <= all_of_them.timeline().peak_bytes - few.timeline().peak_bytes <= 7 * 4
    assert len(few.timeline().events) < len(all_of_them.timeline().events)
