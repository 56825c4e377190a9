import pytest
import torch

from leanbert.models.dropout import dropout, keep_mask


def test_rate_zero_or_evaluation_returns_the_input():
    x = torch.randn(5)
    assert dropout(x, 0.0, training=True) is x
    assert dropout(x, 0.5, training=False) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_of_zeros_and_scale(dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 999, dtype=dtype)
    dropped = dropout(x, 0.1, training=True)
    assert dropped.dtype == dtype
    # Ten standard deviations of a million draws.
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert dropped.max().item() == torch.tensor(1 / 0.9, dtype=dtype).item()


def test_all_four_parts_of_a_draw_are_random_and_independent():
    torch.manual_seed(0)
    parts = keep_mask(torch.empty(200_000, 4), 0.5).T
    assert torch.allclose(torch.corrcoef(parts), torch.eye(4), atol=0.02)
    assert torch.allclose(parts.mean(1), torch.full((4,), 0.5), atol=0.01)


def test_gradient_flows_where_the_value_was_kept():
    torch.manual_seed(0)
    x = torch.full((1000,), 3.0, requires_grad=True)
    kept = dropout(x, 0.25, training=True)
    kept.sum().backward()
    assert torch.equal(x.grad * 3.0, kept.detach())
    assert set(x.grad.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}


def test_the_seed_decides_whatever_the_threads():
    x, before = torch.ones(100_003), torch.get_num_threads()
    masks = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(7)
        masks.append(dropout(x, 0.1, training=True))
    torch.set_num_threads(before)
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], dropout(x, 0.1, training=True))
