import torch

from leanbert.models.attention import make_angles, rotate
from leanbert.models.config import EncoderConfig


def test_rotation_turns_pairs_by_position_times_frequency():
    x = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 1, 1, 1, 4)  # pairs (1, 0) and (0, 2)
    turned = rotate(x, angles(3, head_size=4, theta=100.0)).flatten()
    fast, slow = torch.tensor(3.0), torch.tensor(0.3)
    expected = torch.stack((fast.cos(), -2 * slow.sin(), fast.sin(), 2 * slow.cos()))
    assert torch.allclose(turned, expected, atol=1e-6)


def test_rotated_products_depend_on_the_distance_only():
    query, key = torch.randn(2, 1, 1, 1, 1, 8)
    products = [(rotate(query, angles(place + 5)) * rotate(key, angles(place))).sum() for place in (0, 17, 200)]
    assert torch.allclose(products[0], products[1], atol=1e-5)
    assert torch.allclose(products[0], products[2], atol=1e-5)


def angles(place, head_size=8, theta=10_000.0):
    config = EncoderConfig("modern", hidden_size=head_size, num_heads=1, rotary_theta=theta)
    return make_angles(config.resolved(), torch.tensor([[place]]), torch.empty(0))
