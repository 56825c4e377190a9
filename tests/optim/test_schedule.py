import math

import pytest
import torch

from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.optim.schedule import Schedule, ScheduleConfig, effective_warmup, learning_rate_factor
from tests.tiny import tiny_model


def test_a_schedule_moves_every_group_of_muon():
    optimizer = build_optimizer(tiny_model(), OptimizerConfig(name="muon", lr=3e-3, matrix_lr=0.02))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == [0.01, 1.5e-3, 1.5e-3]
    assert [group["lr"] for inner in optimizer.optimizers for group in inner.param_groups] == [
        0.01,
        1.5e-3,
        1.5e-3,
    ]


def factors(total=100, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(config, step, total) for step in range(total)]


def test_warmup_is_linear_and_reaches_the_peak():
    values = factors(name="constant", warmup_steps=9)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(values[9:]) == {1.0}


def test_linear_cosine_and_wsd():
    assert factors(name="linear", warmup_steps=0)[50] == pytest.approx(0.5)
    assert factors(name="cosine", warmup_steps=0)[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    wsd = factors(name="wsd", warmup_steps=10, decay_share=0.5)
    assert set(wsd[10:51]) == {1.0}
    assert wsd[75] == pytest.approx(0.5)
    assert factors(name="linear", warmup_steps=0, final_share=0.1)[-1] == pytest.approx(0.109)


def test_an_extended_run_goes_on_where_the_longer_schedule_stands():
    config = ScheduleConfig(name="wsd", warmup_steps=10)
    assert learning_rate_factor(config, 100, 100) == 0.0
    assert learning_rate_factor(config, 100, 300) == 1.0
    assert learning_rate_factor(config, 225, 300) == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_is_shortened():
    assert effective_warmup(ScheduleConfig(warmup_steps=50), 40) == 4
    assert effective_warmup(ScheduleConfig(warmup_steps=50), 51) == 50


def test_a_loaded_schedule_goes_on_with_the_rates_and_the_length_of_this_run():
    def begin(scale, total):
        config = OptimizerConfig(name="muon", lr=0.01 * scale, matrix_lr=0.1 * scale)
        optimizer = build_optimizer(tiny_model(), config)
        return optimizer, Schedule(optimizer, ScheduleConfig(name="linear", warmup_steps=0), total)

    (optimizer, schedule), (later, longer) = begin(1, 10), begin(2, 20)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    later.load_state_dict(optimizer.state_dict())
    longer.load_state_dict(schedule.state_dict())
    assert [group["lr"] for group in later.param_groups] == pytest.approx([0.2 * 0.8, 0.02 * 0.8, 0.02 * 0.8])
    later.step()
    longer.step()
    assert [group["lr"] for group in later.param_groups] == pytest.approx([0.2 * 0.75, 0.02 * 0.75, 0.02 * 0.75])
