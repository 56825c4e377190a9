import pytest
import torch

from leanbert.models.pointer import Copied, Pointer, add_copied, copied_log_probs
from tests.tiny import tiny_config

IDS = torch.tensor([[7, 3, 7, 1]])
"""A source that has token 7 twice."""


def half_copied():
    """Two targets that are copied with probability 0.5 and 0.25."""
    probs = torch.tensor([[[0.1, 0.2, 0.15, 0.05], [0.0, 0.0, 0.0, 0.25]]], dtype=torch.float64)
    return Copied(probs, torch.tensor([[0.5, 0.75]], dtype=torch.float64).log(), IDS)


def test_what_occurs_twice_is_copied_with_the_sum_of_both():
    for targets, expected in (([7, 1], [0.25, 0.25]), ([3, 7], [0.2, 0.0]), ([9, -100], [0.0, 0.0])):
        found = copied_log_probs(half_copied(), torch.tensor([targets]))
        assert found.isfinite().all()
        assert found.exp()[0].tolist() == pytest.approx(expected, abs=1e-30)


def test_the_parts_are_added_by_hand():
    logits = torch.zeros(1, 2, 10, dtype=torch.float64)  # each token has 1/10 of the vocabulary's part
    found = add_copied(logits, half_copied()).exp()
    first = torch.full((10,), 0.05, dtype=torch.float64)
    first[[7, 3, 1]] += torch.tensor([0.25, 0.2, 0.05], dtype=torch.float64)
    second = torch.full((10,), 0.075, dtype=torch.float64)
    second[1] += 0.25
    torch.testing.assert_close(found[0], torch.stack((first, second)))


def test_a_pointer_never_points_at_what_is_not_allowed():
    torch.manual_seed(0)
    pointer, hidden, memory = Pointer(tiny_config().resolved()), torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    allowed = torch.ones(2, 3, 5, dtype=torch.bool)
    allowed[0, 1, 2:] = False
    allowed[1, 0] = False  # nothing at all, as of padding
    found = pointer(hidden, pointer.read(memory, torch.zeros(2, 5, dtype=torch.int64), allowed))
    assert found.probs[0, 1, 2:].tolist() == [0.0, 0.0, 0.0]
    assert found.probs.isfinite().all()
    torch.testing.assert_close(found.probs.sum(-1) + found.log_generate.exp(), torch.ones(2, 3))
    torch.testing.assert_close(found.probs.sum(-1), pointer.gate(hidden).sigmoid()[..., 0])


def test_probabilities_are_in_float32_under_autocast():
    torch.manual_seed(0)
    pointer, hidden = Pointer(tiny_config().resolved()), torch.randn(2, 3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = pointer(
            hidden, pointer.read(hidden, torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 1, 3, dtype=torch.bool))
        )
    assert found.probs.dtype == found.log_generate.dtype == torch.float32
