import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.memory.finite import StepCheck
from leanbert.memory.step import backpropagate_all_but_last, optimizer_step
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.optim.in_backward import accumulate_in_backward, update_in_backward
from tests.tiny import PlainTask, tiny_model, unequal_batch


def parameters(*gradients, dtype=torch.float32):
    found = [nn.Parameter(torch.zeros(len(values), dtype=dtype)) for values in gradients]
    for parameter, values in zip(found, gradients, strict=True):
        parameter.grad = torch.tensor(values, dtype=dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_finite_gradients_go_through_bit_for_bit(dtype):
    check, own = StepCheck(), parameters([3.0, -4.0], [0.1], dtype=dtype)
    before = [parameter.grad.clone() for parameter in own]
    check.loss = torch.tensor(2.5)
    check.guard(own)
    assert check.values.tolist() == [2.5, 5.0]
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(own, before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "first", "last"])
def test_not_one_gradient_of_a_bad_step_goes_through(bad, place):
    check, own = StepCheck(), parameters([1.0, bad if place == "first" else 2.0], [bad if place == "last" else 3.0])
    check.loss = torch.tensor(bad if place == "loss" else 1.0)
    check.guard(own)
    assert all(parameter.grad is None for parameter in own)
    loss, norm = check.values.tolist()
    assert math.isfinite(loss) is (place != "loss")
    assert math.isfinite(norm) is (place == "loss")


def test_what_was_bad_once_stays_so_in_the_step():
    check = StepCheck()
    check.guard(parameters([math.nan]))
    later = parameters([1.0])
    check.guard(later)
    assert later[0].grad is None
    check.reset()
    assert check.values.tolist() == [0.0, 0.0]
    good = parameters([1.0])
    check.guard(good)
    assert good[0].grad is not None


class _Elsewhere(torch.Tensor):
    """A flag that says it is on another device, where reading it would wait."""

    @property
    def device(self):
        return torch.device("cuda")

    def __bool__(self):
        raise AssertionError("was read")


def test_elsewhere_than_on_a_cpu_nothing_is_read_and_the_gradients_are_zero(monkeypatch):
    whole = torch.Tensor.all
    monkeypatch.setattr(torch.Tensor, "all", lambda tensor: whole(tensor).as_subclass(_Elsewhere))
    for bad, expected in ((math.inf, [0.0, 0.0]), (2.0, [1.0, 2.0])):
        own = parameters([1.0, bad])
        StepCheck().guard(own)
        assert own[0].grad.tolist() == expected


def test_a_step_without_values_is_looked_at_too():
    with FakeTensorMode():
        check, own = StepCheck(), parameters([1.0, 2.0], [3.0])
        check.loss = torch.ones(())
        check.look(own)
        assert check.values.shape == (2,)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "adafactor", "muon", "adamw8bit"])
def test_a_bad_step_leaves_weights_and_moments_alone(name):
    model = tiny_model(dtype=torch.float32)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2, matrix_lr=1e-2, weight_decay=0.1))
    optimizer_step(PlainTask(model), unequal_batch(), optimizer)  # moments are there
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [t.clone() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    backpropagate_all_but_last(PlainTask(model), unequal_batch())[0].backward()
    next(model.parameters()).grad[0] = math.nan
    StepCheck().guard(model.parameters())
    optimizer.step()
    after = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


@pytest.mark.parametrize("kind", ["update", "accumulate"])
def test_updates_in_backward_are_guarded_one_by_one(kind):
    model, check = tiny_model(dtype=torch.float32), StepCheck()
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-2), sliced=kind == "accumulate")
    if kind == "update":
        update_in_backward(model, optimizer, check.guard)
    else:
        accumulate_in_backward(model, optimizer, lambda: (0, 1), check.guard)
    loss = backpropagate_all_but_last(PlainTask(model), unequal_batch())[0]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    check.loss = torch.tensor(math.inf)  # known before the backward pass
    loss.backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not optimizer.state
    check.reset()
    loss = backpropagate_all_but_last(PlainTask(model), unequal_batch())[0]
    loss.backward()
    assert not any(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_ranks_with_parts_of_the_gradients_agree():
    here, check = parameters([3.0, 4.0]), StepCheck()
    check.guard(here, lambda norm: norm + math.nan)  # of another rank
    assert here[0].grad is None
    here, check = parameters([3.0, 4.0]), StepCheck()
    check.guard(here, lambda norm: norm + 2.0)
    assert check.values.tolist() == [0.0, 7.0]
    assert here[0].grad.tolist() == [3.0, 4.0]
