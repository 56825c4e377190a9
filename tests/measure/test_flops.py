"""Operations by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from leanbert.measure.trace import LiveBytes


def test_attention_on_a_cpu_is_counted():
    heads, length, size = 2, 8, 4
    query, key, value = (torch.randn(1, heads, length, size, requires_grad=True) for _ in range(3))
    with LiveBytes(nn.Identity(), existing=[query, key, value]) as trace:
        F.scaled_dot_product_attention(query, key, value).sum().backward()
    product = 2 * heads * length * length * size
    assert trace.flops == {"forward": 2 * product, "backward": 5 * product}  # the scores are computed again
