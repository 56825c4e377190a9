"""What a step sends and how long it waits, against numbers that follow from sizes and pauses."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from leanbert.distributed.communication import CommunicationTrace, ring_bytes, waiting
from tests.distributed.ranks import on_ranks


def test_ring_sends_all_parts_but_one():
    assert ring_bytes("all_reduce", 4000, 4) == 6000
    assert ring_bytes("all_gather", 4000, 4) == ring_bytes("reduce_scatter", 4000, 4) == 3000
    assert ring_bytes("all_reduce", 1000, 2) == 1000


@pytest.mark.parametrize(
    ("waits", "computes", "expected"),
    [
        ([], [(0, 10)], 0),
        ([(0, 10)], [], 10),
        ([(0, 10), (5, 12)], [(2, 4), (3, 5), (11, 20)], 8),
        ([(0, 4), (6, 9)], [(3, 7)], 5),
        ([(5, 6)], [(0, 1), (2, 10)], 0),
        ([(0, 2), (4, 6), (8, 10)], [(1, 9)], 2),
    ],
)
def test_waiting_is_what_is_sent_while_nothing_is_computed(waits, computes, expected):
    assert waiting(waits, computes) == expected


def traced(rank):
    """Return what a rank sends of 1,000 numbers over both groups of a mesh [2, 2], and its share of waiting."""
    inner = init_device_mesh("cpu", (2, 2)).get_group(1)
    numbers = torch.ones(1000)
    with CommunicationTrace("cpu") as trace:
        if rank == 1:
            time.sleep(0.3)
        dist.all_reduce(numbers)
        dist.all_gather_into_tensor(torch.empty(2000), numbers, group=inner)
    return trace.sent_bytes, trace.wait_share


def test_bytes_are_those_of_a_ring_and_devices_wait():
    found = on_ranks(traced, 4)
    assert {sent for sent, _ in found} == {2 * 3 * 4000 // 4 + 8000 // 2}
    assert all(0 < share < 1 for _, share in found)
