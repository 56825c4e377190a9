import numpy as np
import pytest
import torch

from leanbert.measure.timeline import Event, Storage, Timeline
from leanbert.planning.extrapolation import Course, NoCounterpartError, extrapolate, peaks


def course(repetitions, first=3.0, block=10.0, head=4.0):
    """A pass over blocks and back: each keeps `block` bytes and makes 2 more for a moment; a head between."""
    labels, live = [], []

    def event(phase, name, grows, value):
        labels.append((phase, name, grows))
        live.append([0.0, 0.0, 0.0, value, 0.0])

    now = first
    event("forward", "embeddings", True, now)
    for _ in range(repetitions):
        event("forward", "block", True, now := now + block)
        event("forward", "scratch", True, now + 2)
        event("forward", "scratch", False, now)
    event("forward", "head", True, now + head)
    event("backward", "head", False, now)
    for _ in range(repetitions):
        event("backward", "scratch", True, now + 5)
        event("backward", "scratch", False, now)
        event("backward", "block", False, now := now - block)
    event("backward", "embeddings", False, now - first)
    return Course(tuple(labels), np.array(live))


def peak(phases):
    return {phase: sum(categories.values()) for phase, categories in phases.items()}


@pytest.mark.parametrize("repetitions", [5, 24, 96])
@pytest.mark.parametrize("head", [0.0, 4.0, 50.0])
def test_more_of_the_same_is_foreseen_exactly(repetitions, head):
    found = extrapolate([course(3, head=head)], ([course(4, head=head)], repetitions - 3))
    assert peak(peaks(found)) == peak(peaks([course(repetitions, head=head)]))


def test_the_peak_moves_to_another_event():
    """With few blocks the head is highest, with many the backward pass of the last block: no single affine function."""
    assert peak(peaks([course(3, block=1.0, head=4.0)])) == {"forward": 10.0, "backward": 11.0}
    small, large = ([course(n, first=100.0, block=-10.0, head=0.0)] for n in (3, 4))
    found = extrapolate(small, (large, 5))
    assert peak(peaks(found))["forward"] == 100.0  # bytes that fall by block: the first is highest


def test_two_repetitions_within_each_other():
    """Blocks within slices: extrapolate one, then the other."""

    def run(slices, blocks):
        parts = [course(blocks, block=7.0) for _ in range(slices)]
        live = np.concatenate([part.live + index for index, part in enumerate(parts)])
        return Course(tuple(label for part in parts for label in part.labels), live)

    few = extrapolate([run(2, 3)], ([run(2, 4)], 9))
    more = extrapolate([run(3, 3)], ([run(3, 4)], 9))
    assert peak(peaks(extrapolate(few, (more, 6)))) == peak(peaks([run(8, 12)]))


def test_the_update_of_the_head_is_not_that_of_one_block_more():
    """Updates look alike but for their size: those of 8 bytes for each block, then the head's of 1."""

    def updates(blocks):
        sizes = [8] * blocks + [1, 1]
        storages = [Storage("optimizer", "", "optimizer", (size,), torch.uint8, size) for size in sizes]
        events = [Event(0, "optimizer", s, sign * s.size_bytes) for s in storages for sign in (1, -1)]
        return [Course.of(Timeline([], [Event(0, "optimizer", None, 0), *events]))]

    assert peak(peaks(extrapolate(updates(2), (updates(3), 20)))) == {"optimizer": 8}


def test_what_is_not_alike_is_not_extrapolated():
    other = course(4)
    with pytest.raises(NoCounterpartError):
        extrapolate([course(3)], ([Course(tuple(("forward", "new", True) for _ in other.labels), other.live)], 1))


def test_independent_directions_add_up():
    def run(height, width):
        return Course(course(3).labels, course(3).live * 0 + np.arange(len(course(3).labels))[:, None] * height + width)

    found = extrapolate([run(1, 1)], ([run(2, 1)], 4), ([run(1, 3)], 2))
    assert len(found) == 1  # events are the same: one alignment
    assert (found[0].live == run(5, 5).live).all()
