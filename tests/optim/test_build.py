import copy

import pytest
import torch

from leanbert.errors import UserError
from leanbert.memory.step import optimizer_step
from leanbert.models.classifier import Classifier
from leanbert.optim.build import OptimizerConfig, build_optimizer
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


@pytest.mark.parametrize(
    ("saved", "name"), [("adamw", "sgd"), ("adamw", "adam"), ("sgd", "momentum"), ("muon", "adamw")]
)
def test_state_of_another_optimizer_is_refused(saved, name):
    model = tiny_model(dtype=torch.float32)
    state = build_optimizer(model, OptimizerConfig(name=saved)).state_dict()
    with pytest.raises(UserError, match=rf"^model\.optimizer\.name: {name}, but the checkpoint is of {saved}\. Set it"):
        build_optimizer(model, OptimizerConfig(name=name)).load_state_dict(state)
    del state["name"]  # as older checkpoints are
    build_optimizer(model, OptimizerConfig(name=saved)).load_state_dict(state)


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


@pytest.mark.parametrize("name", NAMES)
def test_going_on_takes_the_settings_that_are_given(name):
    """Of decays and offsets, as of rates; the state and its number of steps are the checkpoint's."""
    model, batch = tiny_model(dtype=torch.float32), unequal_batch()
    saved = build_optimizer(model, OptimizerConfig(name=name))
    optimizer_step(PlainTask(model), batch, saved)
    given = OptimizerConfig(name=name, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, momentum=0.5)
    resumed, new = build_optimizer(model, given), build_optimizer(model, given)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    options = ("betas", "eps", "weight_decay", "momentum")
    taken, right = ([[group.get(name) for name in options] for group in o.param_groups] for o in (resumed, new))
    assert taken == right
    assert taken != [[group.get(name) for name in options] for group in saved.param_groups]
    assert resumed.steps == 1
