from __future__ import annotations

import pytest
import torch

from leanbert.optim.muon import Muon, orthogonal

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def trained(kind, monkeypatch=None, products=True):
    """Take three steps from the same weights with the same gradients; return the weights and the averages."""
    if monkeypatch is not None:
        monkeypatch.setattr("leanbert.optim.muon.has_16_bit_products", lambda device: products)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 20), (24, 8), (16, 16))]
    optimizer = kind(weights, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    return weights, [optimizer.state[weight]["momentum_buffer"] for weight in weights]


def test_with_16_bit_products_it_is_that_of_torch(monkeypatch):
    for own, theirs in zip(trained(Muon, monkeypatch)[0], trained(torch.optim.Muon)[0], strict=True):
        assert torch.equal(own, theirs)


def test_in_float32_it_differs_by_the_rounding_of_bfloat16_only(monkeypatch):
    own, averages = trained(Muon, monkeypatch, products=False)
    theirs, their_averages = trained(torch.optim.Muon)
    for one, other in zip(own, theirs, strict=True):
        assert 0 < (one - other).abs().max() < 3 * 0.02 * 2**-5  # three updates, whose entries are below 1
    for one, other in zip(averages, their_averages, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_singular_values_come_near_1_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = orthogonal(matrix, COEFFICIENTS, 5, 1e-7)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ found @ right.T
    assert inner.diagonal().min() > 0.6
    assert inner.diagonal().max() < 1.3
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-8
