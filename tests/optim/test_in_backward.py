import pytest
import torch

from leanbert.memory.finite import StepCheck
from leanbert.memory.step import optimizer_step
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.optim.in_backward import accumulate_in_backward, update_in_backward
from tests.tiny import PlainTask, tiny_model, unequal_batch


def update_guarded(model, optimizer):
    update_in_backward(model, optimizer, StepCheck().guard)


def trained(name, steps=3, prepare=None, micro_batch=None, dtype=torch.float64, sliced=False):
    """Return parameters after some steps, and the largest number of gradients that existed at a time."""
    model = tiny_model(dtype=dtype)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=1e-2, matrix_lr=1e-2), sliced=sliced)
    most = 0

    def count(parameter):
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    if prepare:
        prepare(model, optimizer)
    for step in range(steps):
        optimizer_step(PlainTask(model), unequal_batch(seed=step), optimizer, micro_batch=micro_batch)
        assert all(parameter.grad is None for parameter in model.parameters())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, most


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw", "adafactor", "muon", "adamw8bit"])
def test_same_parameters_and_one_gradient_at_a_time(name):
    plain, all_gradients = trained(name)
    inside, gradients = trained(name, prepare=update_guarded)
    assert (all_gradients, gradients) == (len(plain), 1)
    for key, value in inside.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-12)


def test_several_backward_passes_would_update_several_times():
    """Why gradient accumulation is refused with it."""
    plain, _ = trained("adamw", micro_batch=2)
    inside, _ = trained("adamw", prepare=update_guarded, micro_batch=2)
    assert any(not torch.allclose(inside[key], plain[key], rtol=1e-3) for key in plain)


def adama_by_hand(steps, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, decay=0.01):
    """Adam Accumulation written out: moments of each micro-batch's gradient, one update a step."""
    model = tiny_model()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(steps):
        batch = unequal_batch(seed=step)
        total = (batch.targets != -100).sum()
        for index, part in enumerate(batch.split(2)):
            (PlainTask(model).loss_sum(part) / total).backward()
            for name, p in model.named_parameters():
                first, second = moments[name]
                if index == 0:
                    first.mul_(betas[0])
                    second.mul_(betas[1])
                first.add_((1 - betas[0]) * p.grad)
                second.add_((1 - betas[1]) * p.grad**2)
                p.grad = None
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = (m / (1 - b ** (step + 1)) for m, b in zip(moments[name], betas, strict=True))
                p.mul_(1 - lr * (decay if p.ndim > 1 else 0.0))
                p.sub_(lr * first / (second.sqrt() + eps))
    return dict(model.named_parameters())


def test_adam_accumulation_is_that_of_the_paper():
    place = [0, 4]

    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=1e-2), sliced=True)
    accumulate_in_backward(model, optimizer, lambda: (place[0], place[1]), StepCheck().guard)
    for step in range(3):
        optimizer_step(
            PlainTask(model),
            unequal_batch(seed=step),
            optimizer,
            micro_batch=2,
            seed_micro_batch=lambda index: place.__setitem__(0, index),
        )
    for name, value in adama_by_hand(3).items():
        torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=1e-6, atol=1e-10)


def test_layer_major_makes_in_backward_exact_with_slices():
    def prepare(model, optimizer):
        for block in model.encoder.blocks:
            block.slice_rows = 3
        update_guarded(model, optimizer)

    plain, _ = trained("adamw")
    sliced, most = trained("adamw", prepare=prepare)
    assert most == 1
    for key, value in sliced.items():
        torch.testing.assert_close(value, plain[key], rtol=1e-6, atol=1e-12)
