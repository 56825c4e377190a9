import copy
import math

import pytest
import torch

from leanbert.memory.step import optimizer_step
from leanbert.models.classifier import Classifier
from leanbert.optim.build import (
    OptimizerConfig,
    Schedule,
    ScheduleConfig,
    build_optimizer,
    effective_warmup,
    learning_rate_factor,
)
from leanbert.pretrained.build import build_model
from tests.pretrained.pairs import tiny_seq2seq
from tests.tiny import PlainTask, tiny_config, tiny_model, unequal_batch

NAMES = ["sgd", "momentum", "adam", "adamw", "adafactor", "muon"]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns(name):
    model, batch = tiny_model(dtype=torch.float32), unequal_batch()
    lr = {"sgd": 1.0, "momentum": 0.1, "adafactor": 0.05}.get(name, 1e-2)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=lr))
    losses = [optimizer_step(PlainTask(model), batch, optimizer).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["bert", "modern"])
def test_norms_and_biases_are_never_decayed(name, preset):
    model = tiny_model(preset=preset)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, weight_decay=0.1))
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen.add(id(parameter))
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)
    assert seen == {id(parameter) for parameter in model.parameters()}


def test_muon_takes_hidden_matrices_and_nothing_else():
    model = tiny_model()
    muon, adamw = build_optimizer(model, OptimizerConfig(name="muon")).optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {name for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name}
    assert any("embeddings.token" in names[id(p)] for group in adamw.param_groups for p in group["params"])


@pytest.mark.parametrize(
    ("model", "outputs"),
    [
        (lambda: build_model(tiny_config(preset="bert"), 99, lambda c: Classifier(c, ["a"], "text", "classification")),
         {"head.scores.weight"}),
        (lambda: build_model(tiny_config(), 99, lambda c: Classifier(c, ["a", "b"], "word", "tagging")),
         {"head.scores.weight"}),
        (lambda: tiny_seq2seq(copy=True), {"pointer.gate.weight"}),
        (lambda: tiny_seq2seq(targets=70), set()),
    ],
)  # fmt: skip
def test_muon_leaves_outputs_and_embeddings_to_adamw(model, outputs):
    model = model()
    muon, _ = build_optimizer(model, OptimizerConfig(name="muon")).optimizers
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    matrices = {name for name, p in model.named_parameters() if p.ndim == 2}
    assert matrices - taken == outputs | {name for name in matrices if ".embeddings." in name}


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_saving(name, tmp_path):
    """Three steps equal two steps, a save and a load into a new model and optimizer, and one step."""
    config, batch = OptimizerConfig(name=name, lr=1e-2), unequal_batch()
    model = tiny_model(dtype=torch.float32)
    optimizer = build_optimizer(model, config)
    for _ in range(2):
        optimizer_step(PlainTask(model), batch, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    optimizer_step(PlainTask(model), batch, optimizer)

    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    other = tiny_model(dtype=torch.float32, seed=1)
    other.load_state_dict(stored["model"])
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(stored["optimizer"]))
    optimizer_step(PlainTask(other), batch, resumed)
    for expected, actual in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(expected, actual)


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
