import pytest
import torch
import torch.nn.functional as F

from leanbert.models.kernels import attention
from leanbert.models.kernels.attention import additive, attend, prefers_products, same_document


def test_mask_has_the_dtype_of_the_products():
    allowed = torch.tensor([[[[True, False]]]])
    with torch.autocast("cpu", torch.bfloat16):
        assert additive(allowed, torch.empty(0)).dtype == torch.bfloat16
    mask = additive(allowed, torch.empty(0, dtype=torch.float64))
    assert mask.dtype == torch.float64
    assert mask.flatten().tolist() == [0.0, float("-inf")]


def test_documents_of_queries_and_keys_are_compared():
    found = same_document(torch.tensor([[0, 1]]), torch.tensor([[0, 0, 1]]))
    assert found.tolist() == [[[[True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("masked", [False, True])
def test_products_and_fused_kernel_agree_forward_and_backward(monkeypatch, masked):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 2, 4, 9, 8, generator=generator, dtype=torch.float64)
    ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = additive(same_document(ids, ids), parts) if masked else None
    results = []
    for products in (False, True):
        monkeypatch.setattr(attention, "prefers_products", lambda *_, chosen=products: chosen)
        leaf = parts.clone().requires_grad_()
        out = attend(*leaf, mask)
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


def test_kernel_choice():
    def chosen(queries, dtype, rate=0.0, device="cpu"):
        return prefers_products(torch.empty(1, 1, queries, 8, dtype=dtype, device=device), rate)

    assert [chosen(queries, torch.bfloat16) for queries in (15, 16, 512, 513)] == [False, True, True, False]
    assert not chosen(512, torch.float32)
    assert chosen(513, torch.float32, rate=0.1)
    assert not chosen(512, torch.bfloat16, device="meta")
    assert not chosen(512, torch.float32, rate=0.1, device="meta")
