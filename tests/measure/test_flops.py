"""Operations by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from leanbert.measure.flops import FLOPS
from leanbert.measure.trace import LiveBytes


def test_attention_on_a_cpu_is_counted():
    heads, length, size = 2, 8, 4
    query, key, value = (torch.randn(1, heads, length, size, requires_grad=True) for _ in range(3))
    with LiveBytes(nn.Identity(), existing=[query, key, value]) as trace:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    product = 2 * heads * length * length * size
    assert trace.flops == {"forward": 2 * product, "backward": 5 * product}  # the scores are computed again


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mm", [(2, 3), (3, 5)]),
        ("addmm", [(5,), (2, 3), (3, 5)]),
        ("bmm", [(7, 2, 3), (7, 3, 5)]),
        ("baddbmm", [(7, 2, 5), (7, 2, 3), (7, 3, 5)]),
    ],
)
def test_products_are_counted_as_torch_counts_them(name, shapes):
    operation, tensors = getattr(torch.ops.aten, name), [torch.zeros(shape) for shape in shapes]
    count = FLOPS[operation](*tensors, out_val=operation(*tensors))
    assert count == flop_registry[operation](*tensors, out_val=operation(*tensors))
    assert count == 2 * 2 * 3 * 5 * (7 if "b" in name[:2] else 1)
