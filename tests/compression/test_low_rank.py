"""Ranks and errors by hand, and that whitening loses less of what the model computes."""

import copy

import pytest
import torch
from torch import nn

from leanbert.compression.low_rank import (
    LowRankLinear,
    factorise,
    factorise_embedding,
    make_embedding_low_rank,
    make_low_rank,
    second_moments,
    token_counts,
)
from leanbert.errors import UserError
from leanbert.models.packed_inputs import PackedInputs
from tests.compression.onnx.models import make


def of_singular_values(*values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=generator).double()).Q for n in (5, 4))
    return left[:, : len(values)] @ torch.diag(torch.tensor(values).double()) @ right[: len(values)]


def test_the_lowest_rank_that_keeps_the_energy():
    weight = of_singular_values(4.0, 2.0, 2.0, 1.0)  # of 25: 16, 4, 4, 1
    for energy, rank, kept in ((0.5, 1, 0.64), (0.64, 1, 0.64), (0.65, 2, 0.8), (0.96, 3, 0.96), (1.0, 4, 1.0)):
        factors = factorise(weight, energy)
        assert (factors.down.shape, factors.up.shape) == ((rank, 4), (5, rank))
        assert factors.kept == pytest.approx(kept)
        lost = (weight - factors.up @ factors.down).square().sum()
        assert float(lost) == pytest.approx(25 * (1 - kept), abs=1e-9)


def test_whitened_factors_lose_as_much_of_the_outputs_as_they_say_and_plain_ones_more():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).double()
    x = torch.randn(1000, 16, generator=generator).double() * torch.logspace(1, -1, 16)
    outputs = x @ weight.T
    factors = factorise(weight, 0.95, x.T @ x / len(x))
    plain = factorise(weight, 0.0)
    left, values, right = torch.linalg.svd(weight)
    rank = len(factors.down)
    plain = left[:, :rank] * values[:rank] @ right[:rank]
    lost, lost_by_plain = (
        float((outputs - x @ approximation.T).square().sum() / outputs.square().sum())
        for approximation in (factors.up @ factors.down, plain)
    )
    assert lost == pytest.approx(1 - factors.kept, rel=0.02)
    assert lost < 0.05 < 3 * lost < lost_by_plain


def test_inputs_that_never_vary_are_no_problem():
    x = torch.zeros(10, 4)
    x[:, 0] = 1.0
    factors = factorise(torch.eye(4), 0.999, x.T @ x / 10)
    torch.testing.assert_close(factors.up @ factors.down @ x[0], x[0], rtol=1e-3, atol=1e-3)
    assert factorise(torch.zeros(3, 3), 0.9).up.isfinite().all()


def test_moments_are_means_over_all_tokens_of_all_calls():
    layer, x = nn.Linear(3, 2), torch.randn(4, 5, 3)
    holder = nn.ModuleDict({"a": layer})
    with second_moments(holder) as moments:
        layer(x[:1])
        layer(x[1:])
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(moments["a"], flat.T @ flat / 20)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("task", ["tagging", "seq2seq"])
def test_layers_are_replaced_where_that_is_smaller(task):
    model, _ = make(task, copy=task == "seq2seq")
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.shape[0] > 3:
            with torch.no_grad():
                layer.weight.copy_(torch.outer(layer.weight[:, 0], layer.weight[0]))  # rank 1
    before = copy.deepcopy(model)
    inputs = PackedInputs.whole_rows(torch.randint(100, (2, 9)))
    arguments = (inputs, inputs) if task == "seq2seq" else (inputs,)
    count = make_low_rank(model, 0.999)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert count == len([module for module in before.modules() if isinstance(module, nn.Linear)]) - len(left)
    assert left == (["pointer.gate"] if task == "seq2seq" else ["head.scores"])
    assert {len(module.down) for module in model.modules() if isinstance(module, LowRankLinear)} == {1}
    with torch.no_grad():
        torch.testing.assert_close(model(*arguments), before(*arguments), rtol=1e-4, atol=1e-5)


def test_a_shared_layer_is_replaced_once_and_stays_shared():
    model, _ = make("seq2seq")
    for decoder, encoder in zip(model.decoder.blocks, (0, 0, 1), strict=True):
        decoder.feed_forward = model.encoder.blocks[encoder].feed_forward
    make_low_rank(model, 0.5)
    assert isinstance(model.encoder.blocks[0].feed_forward.input, LowRankLinear)
    assert model.decoder.blocks[1].feed_forward.input is model.encoder.blocks[0].feed_forward.input


def test_nothing_gained_or_not_calibrated_is_an_error():
    model, _ = make("tagging")
    with pytest.raises(UserError, match=r"^low_rank: at 100% of the energy no layer gets smaller"):
        make_low_rank(model, 1.0)
    with pytest.raises(UserError, match=r"^low_rank: encoder\.blocks\.0\.attention\.qkv was not run"):
        make_low_rank(model, 0.9, {})


def test_tokens_that_are_looked_up_more_often_lose_less():
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    counts = torch.tensor([99, 99, 99, 0, 0, 0])
    factors = factorise_embedding(table, 0.9, counts)
    assert (factors.up.shape, factors.down.shape) == ((6, 3), (3, 4))
    lost = (table - factors.up @ factors.down).square().sum(1) / table.square().sum(1)
    assert lost[:3].max() < 0.01 < 0.1 < lost[3:].mean()
    weight = (counts + 1).double()
    energy = float((weight @ lost.mul(table.square().sum(1))) / (weight @ table.square().sum(1)))
    assert energy == pytest.approx(1 - factors.kept, rel=1e-6)
    assert factors.kept >= 0.9


def test_tokens_are_counted_without_padding():
    model, _ = make("classification")
    inputs = PackedInputs.whole_rows(torch.tensor([[5, 5, 7], [7, 9, 0]]))
    inputs.document_ids[1, 2] = -1
    with token_counts(model) as counts:
        model.encode(inputs)
        model.encode(inputs)
    assert counts.nonzero().flatten().tolist() == [5, 7, 9]
    assert counts[[5, 7, 9]].tolist() == [4, 4, 2]
    model.encode(inputs)
    assert counts.sum() == 10


def test_an_embedding_of_low_rank_is_two_matrices_of_the_same_function():
    model, _ = make("classification")
    with torch.no_grad():
        table = model.encoder.embeddings.token.weight
        table.copy_(torch.outer(table[:, 0], table[0]))  # rank 1
    before, rows = copy.deepcopy(model), len(table)
    make_embedding_low_rank(model, 0.999, torch.zeros(rows))
    assert model.encoder.embeddings.token.weight.shape == (rows, 1)
    width = model.config.hidden_size
    assert before.num_parameters - model.num_parameters == 100 * width - (100 + width)  # of 100 tokens
    inputs = PackedInputs.whole_rows(torch.randint(100, (2, 9)))
    torch.testing.assert_close(model.encode(inputs), before.encode(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["mlm", "seq2seq"])
def test_an_embedding_that_is_the_output_matrix_too_stays(task):
    model, _ = make(task)
    with pytest.raises(UserError, match=r"^low_rank_embedding: here the token embedding is also the output matrix"):
        make_embedding_low_rank(model, 0.5, torch.zeros(128))


def test_an_embedding_that_gets_no_smaller_is_an_error():
    model, _ = make("tagging")
    with pytest.raises(UserError, match=r"^low_rank_embedding: at 100% of the energy it gets no smaller"):
        make_embedding_low_rank(model, 1.0, torch.zeros(128))
