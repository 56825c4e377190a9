import math

import pytest
import torch
from torch.nn import functional as F

from leanbert.tasks.metrics import MaskedLMMetrics


def test_values_over_batches_of_unequal_size_equal_one_big_batch():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 4, 11), torch.randint(0, 11, (6, 4))
    targets[0, 1:] = -100
    targets[5, :] = -100
    metrics = MaskedLMMetrics()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)):
        metrics.update(logits[rows], targets[rows])
    values = metrics.compute()
    used = targets != -100
    expected = F.cross_entropy(logits[used], targets[used]).item()
    assert values["loss"] == pytest.approx(expected)
    assert values["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert values["accuracy"] == pytest.approx((logits.argmax(-1) == targets)[used].float().mean().item())
    assert "unigram_loss" not in values


def test_compute_starts_afresh():
    metrics = MaskedLMMetrics()
    metrics.update(torch.zeros(1, 1, 4), torch.tensor([[1]]))
    assert metrics.compute()["loss"] == pytest.approx(math.log(4))
    confident = torch.tensor([[[0.0, 50.0, 0.0, 0.0]]])
    metrics.update(confident, torch.tensor([[1]]))
    assert metrics.compute()["loss"] == pytest.approx(0.0)


def test_the_baseline_is_the_loss_of_unigram_counts_on_the_same_targets():
    counts = torch.tensor([0, 6, 1, 1])
    metrics = MaskedLMMetrics(counts)
    targets = torch.tensor([[1, 0, -100]])
    metrics.update(torch.zeros(1, 3, 4), targets)
    expected = -(math.log(7 / 12) + math.log(1 / 12)) / 2  # one added to each count
    assert metrics.compute()["unigram_loss"] == pytest.approx(expected)
