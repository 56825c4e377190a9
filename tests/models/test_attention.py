import pytest
import torch
import torch.nn.functional as F

from leanbert.models import attention
from leanbert.models.attention import additive_mask, attend, prefers_products, rotary_angles, rotate

INF = float("-inf")


def test_mask_keeps_documents_apart():
    mask = additive_mask(torch.tensor([[0, 0, 1, -1, -1]]), 5, 0, torch.empty(0))
    assert mask.shape == (1, 1, 5, 5)
    together = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert mask[0, 0].tolist() == [[0.0 if seen else INF for seen in row] for row in together]


def test_window_limits_the_distance_to_its_half_on_either_side():
    mask = additive_mask(None, 5, 2, torch.empty(0))
    assert mask[0, 0, 2].tolist() == [INF, 0.0, 0.0, 0.0, INF]
    assert additive_mask(None, 5, 0, torch.empty(0)) is None


def test_mask_has_the_dtype_of_the_products():
    ids = torch.zeros(1, 3, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        assert additive_mask(ids, 3, 0, torch.empty(0)).dtype == torch.bfloat16
    assert additive_mask(ids, 3, 0, torch.empty(0, dtype=torch.float64)).dtype == torch.float64


def test_rotation_turns_pairs_by_position_times_frequency():
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 1, 4)  # pairs (1, 0) and (0, 2)
    turned = rotate(x, rotary_angles(torch.tensor([[3]]), 4, 100.0, torch.float32)).flatten()
    fast, slow = torch.tensor(3.0), torch.tensor(0.3)
    expected = torch.stack((fast.cos(), -2 * slow.sin(), fast.sin(), 2 * slow.cos()))
    assert torch.allclose(turned, expected, atol=1e-6)


def test_rotated_products_depend_on_the_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 1, 8)
    products = [(rotate(query, angles(place + 5)) * rotate(key, angles(place))).sum() for place in (0, 17, 200)]
    assert torch.allclose(products[0], products[1], atol=1e-5)
    assert torch.allclose(products[0], products[2], atol=1e-5)


def angles(place):
    return rotary_angles(torch.tensor([[place]]), 8, 10_000.0, torch.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_products_and_fused_kernel_agree_forward_and_backward(monkeypatch, masked):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 2, 4, 9, 8, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = additive_mask(ids, 9, 0, parts) if masked else None
    results = []
    for products in (False, True):
        monkeypatch.setattr(attention, "prefers_products", lambda *_, chosen=products: chosen)
        leaf = parts.clone().requires_grad_()
        out = attend(*leaf, mask, 0.0)
        out.square().sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


def test_dropout_of_probabilities_keeps_the_mean():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 6, 4)
    dropped = attend(*(part.expand(4000, -1, -1, -1) for part in (query, key, value)), None, 0.3)
    assert dropped.std(0).min() > 0.05
    mean = dropped.mean(0, keepdim=True)
    assert torch.allclose(mean, F.scaled_dot_product_attention(query, key, value), atol=0.05)


def test_kernel_choice_on_the_cpu():
    short, long = torch.empty(1, 1, 512, 8), torch.empty(1, 1, 513, 8)
    assert not prefers_products(short, 0.0)
    assert prefers_products(short.bfloat16(), 0.0)
    assert not prefers_products(long.bfloat16(), 0.0)
    assert prefers_products(long, 0.1)
    assert not prefers_products(short.to("meta").bfloat16(), 0.1)
