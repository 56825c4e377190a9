import pytest
import torch

from leanbert.models.packed_inputs import PackedInputs
from tests.tiny import tiny_model, whole_rows

INF = float("-inf")


@pytest.fixture
def encoder():
    return tiny_model(local_window=2, global_every=2, position="learned").encoder


def test_mask_keeps_documents_apart(encoder):
    ids = torch.zeros(1, 5, dtype=torch.int64)
    inputs = PackedInputs(ids, ids, torch.tensor([[0, 0, 1, -1, -1]]))
    mask = encoder.make_context(inputs, torch.empty(0)).mask
    assert mask.shape == (1, 1, 5, 5)
    together = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert mask[0, 0].tolist() == [[0.0 if seen else INF for seen in row] for row in together]


def test_window_limits_the_distance_to_its_half_on_either_side(encoder):
    inputs = whole_rows(torch.zeros(1, 5, dtype=torch.int64))
    assert encoder.make_context(inputs, torch.empty(0), local=True).mask[0, 0, 2].tolist() == [INF, 0.0, 0.0, 0.0, INF]
    assert not encoder.make_context(inputs, torch.empty(0)).mask.any()
