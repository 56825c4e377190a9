from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

import leanbert
from leanbert.callbacks.techniques.pruning import MagnitudePruning, StructuredPruning
from leanbert.compression.pruning import prunable, sparsity_of
from leanbert.compression.structured import prune_structured, taylor_importance
from leanbert.errors import UserError
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.settings import SHIPPED
from tests.tasks.test_seq2seq import run as run_translation
from tests.tiny import PlainTask, tiny_model, unequal_batch


class Module(pl.LightningModule):
    """A task with one batch per step, a function of the step; `shrink` is what a resumed run does before it loads."""

    def __init__(self, shrink=None, optimizer="muon"):
        super().__init__()
        self.techniques = SimpleNamespace(structured=None)
        self.optimizer_config = OptimizerConfig(name=optimizer, lr=1e-2, matrix_lr=0.2)
        self.model = tiny_model(dtype=torch.float32)
        if shrink:
            prune_structured(self.model, *shrink)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(1000), batch_size=None)

    def training_step(self, batch, batch_idx):
        return PlainTask(self.model).loss_sum(unequal_batch(seed=self.global_step)) / 28

    def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad(set_to_none=True)  # as leanbert's tasks do

    def configure_optimizers(self):
        return build_optimizer(self.model, self.optimizer_config)


class Watch(Callback):
    """Notes after each step what the next forward pass will see."""

    def __init__(self):
        self.sparsity, self.zeros = {}, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = prunable(pl_module.model)
        self.sparsity[trainer.global_step] = sparsity_of(weights)
        zeros = torch.cat([(weight == 0).flatten() for weight in weights.values()])
        assert self.zeros is None or (zeros | ~self.zeros).all(), "a pruned weight came back"
        self.zeros = zeros


class Logger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_metrics(self, metrics, step):
        self.logged[step] = metrics


def fit(*callbacks, module=None, steps=10, folder=None, save_every=0, ckpt_path=None, logger=False):
    module = module or Module()
    saving = [ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=save_every)] if save_every else []
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[*callbacks, *saving],
        logger=logger,
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=4,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return module


def state(module):
    return {name: tensor.clone() for name, tensor in module.model.state_dict().items()}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_sparsity_follows_the_schedule_and_holds_after_every_step(scope, optimizer):
    watch, logger = Watch(), Logger()
    pruning = MagnitudePruning(0.6, scope, start_step=2, end_step=8, every_n_steps=3)
    module = fit(pruning, watch, module=Module(optimizer=optimizer), logger=logger)
    half = 0.6 * (1 - 0.5**3)
    expected = {**dict.fromkeys(range(1, 5), 0.0), **dict.fromkeys((5, 6, 7), half), **dict.fromkeys((8, 9, 10), 0.6)}
    tolerance = 1e-3 if scope == "layer" else 3e-5  # one of the weights of a matrix, or of all
    assert watch.sparsity == pytest.approx(expected, abs=tolerance)
    weights = prunable(module.model)
    if scope == "layer":
        assert all(sparsity_of({"": weight}) == pytest.approx(0.6, abs=tolerance) for weight in weights.values())
    others = [parameter for name, parameter in module.model.named_parameters() if name not in weights]
    assert all((parameter != 0).float().mean() > 0.9 for parameter in others if parameter.numel() != 128)
    found = {step: metrics["pruning/sparsity"] for step, metrics in logger.logged.items()}
    assert found == {step: watch.sparsity[step] for step in (4, 5, 8)}  # every 4 steps and at each change


def test_embeddings_are_pruned_only_if_asked():
    for asked in (False, True):
        module = fit(MagnitudePruning(start_step=0, end_step=0, include_embeddings=asked), steps=2)
        zeros = (module.model.encoder.embeddings.token.weight[:100] == 0).float().mean()
        assert zeros.item() == pytest.approx(0.5, abs=0.1) if asked else zeros == 0


def test_two_of_four_is_pruned_once_and_what_does_not_come_in_fours_stays_dense(capsys):
    watch = Watch()
    module = fit(MagnitudePruning(scope="2:4", start_step=3), watch, steps=5)
    assert (watch.sparsity[2], watch.sparsity[3] > 0.3) == (0.0, True)
    for name, weight in prunable(module.model).items():
        if weight.shape[-1] % 4 == 0:
            assert ((weight.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all(), name
        else:
            assert (weight != 0).all(), name
    # 8/3 x 32 are 84 neurons, in fours: all fits
    assert "dense" not in capsys.readouterr().err
    odd = Module()
    prune_structured(odd.model, 2, 82)
    fit(MagnitudePruning(scope="2:4", start_step=0), module=odd, steps=1)
    assert "2:4 leaves 2 matrices dense" in capsys.readouterr().err


def test_pruning_at_step_0_comes_before_the_first_forward():
    seen = []

    class First(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append(sparsity_of(prunable(pl_module.model)))

    fit(MagnitudePruning(start_step=0, end_step=0), First(), steps=1)
    assert seen == pytest.approx([0.5], abs=3e-5)


@pytest.mark.parametrize("at", [3, 5, 8])
def test_a_resumed_run_equals_one_that_was_not_killed(tmp_path, at):
    """Killed before, between and after updates of the masks."""

    def pruning():
        return MagnitudePruning(0.6, start_step=2, end_step=8, every_n_steps=2)

    whole = fit(pruning(), folder=tmp_path, save_every=1)
    watch = Watch()
    resumed = fit(pruning(), watch, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert min(watch.sparsity) == at + 1
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(resumed).items())


def test_checkpoints_hold_plain_weights_and_no_mask(tmp_path):
    module = fit(MagnitudePruning(start_step=1, end_step=2), steps=4, folder=tmp_path, save_every=4)
    stored = torch.load(tmp_path / "step=4.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == module.state_dict().keys()
    assert stored["callbacks"]["MagnitudePruning"] == {"sparsity": 0.5}
    other = tiny_model(dtype=torch.float32, seed=1)
    other.load_state_dict({name.removeprefix("model."): tensor for name, tensor in stored["state_dict"].items()})
    assert sparsity_of(prunable(other)) == pytest.approx(0.5, abs=3e-5)


def test_a_run_made_longer_never_brings_weights_back(tmp_path):
    fit(MagnitudePruning(), steps=5, folder=tmp_path, save_every=5)
    watch = Watch()
    fit(MagnitudePruning(), watch, steps=20, ckpt_path=tmp_path / "step=5.ckpt")
    assert len(watch.sparsity) == 15
    assert all(sparsity == pytest.approx(0.5, abs=3e-5) for sparsity in watch.sparsity.values())


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("final_sparsity", {"final_sparsity": 0.0}),
        ("final_sparsity", {"final_sparsity": 1.0}),
        ("scope", {"scope": "row"}),
        ("start_step", {"start_step": -1}),
        ("end_step", {"start_step": 5, "end_step": 4}),
        ("every_n_steps", {"every_n_steps": 0}),
        ("final_sparsity", {"scope": "2:4", "final_sparsity": 0.6}),
        ("end_step", {"scope": "2:4", "end_step": 9}),
        ("every_n_steps", {"scope": "2:4", "every_n_steps": 9}),
    ],
)
def test_senseless_settings_are_named(setting, values):
    with pytest.raises(UserError, match=rf"^MagnitudePruning\.{setting}: [^\n]*\.$"):
        MagnitudePruning(**values)


@pytest.mark.parametrize("setting", ["start_step", "end_step"])
def test_a_run_that_ends_too_early_is_refused(setting):
    with pytest.raises(UserError, match=rf"^MagnitudePruning\.{setting}: 11 is after the last step"):
        fit(MagnitudePruning(**{setting: 11}))


def test_nothing_to_prune_raises():
    module = Module()
    module.model.encoder.blocks = torch.nn.ModuleList()
    module.model.head.dense = torch.nn.Identity()
    with pytest.raises(UserError, match=r"^MagnitudePruning\.scope: global matches no weight"):
        MagnitudePruning().on_train_start(SimpleNamespace(), module)


# ---- heads and neurons


@pytest.mark.parametrize("importance", ["weight", "taylor"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_model_in_training_shrinks_and_goes_on(importance, optimizer, capsys):
    module = Module(optimizer=optimizer)
    full = module.model.num_parameters
    module = fit(StructuredPruning(0.5, 0.25, at_step=4, importance=importance), module=module, steps=8)
    assert (module.model.config.num_heads, module.model.config.intermediate_size) == (1, 63)
    assert full - module.model.num_parameters == 2 * (16 * 4 * 32 + 21 * 3 * 32)
    line = capsys.readouterr().err
    assert "step 4: 1 of 2 heads and 63 of 84 neurons stay in each block" in line
    optimizer = module.optimizers().optimizer
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(parameter) for parameter in module.model.parameters()
    }
    for parameter in module.model.parameters():
        buffers = [value for value in optimizer.state[parameter].values() if value.numel() > 1]
        assert buffers
        assert all(value.shape == parameter.shape for value in buffers)


@pytest.mark.parametrize(("importance", "stays"), [("weight", True), ("taylor", False)])
def test_taylor_sees_gradients_and_not_sizes(importance, stays):
    """The first head has large weights, and an output that gets no gradient."""
    module = Module(optimizer="sgd")
    first = torch.arange(32) < 16
    for block in module.model.encoder.blocks:
        weight = block.attention.output.weight
        with torch.no_grad():
            weight[:, first] *= 10
        weight.register_hook(lambda grad: grad * ~first[: grad.shape[1]])
    before = module.model.encoder.blocks[0].attention.output.weight[:, first].detach().clone()
    fit(StructuredPruning(0.5, 0.0, at_step=2, importance=importance), module=module, steps=3)
    found = module.model.encoder.blocks[0].attention.output.weight
    assert torch.allclose(found, before, rtol=0.2) is stays


def test_taylor_adds_up_the_last_steps_before_the_removal():
    module, callback = Module(), StructuredPruning(at_step=10, importance="taylor", importance_steps=3)
    PlainTask(module.model).loss_sum(unequal_batch()).backward()
    once = taylor_importance(module.model)
    for step, times in ((6, 0), (7, 1), (8, 2), (9, 3), (10, 3)):
        callback.on_before_optimizer_step(SimpleNamespace(global_step=step), module, None)
        found = callback.state_dict()["scores"]
        assert found is None or all(torch.allclose(sums, times * one) for sums, one in zip(found, once, strict=True))
        assert (found is None) is (times == 0)


@pytest.mark.parametrize("at", [3, 4, 6])
def test_a_structurally_pruned_run_resumes_exactly(tmp_path, at):
    """Killed while gradients are summed, at the removal and after it."""

    def pruning():
        return StructuredPruning(0.5, 0.25, at_step=4, importance="taylor", importance_steps=3)

    whole = fit(pruning(), steps=8, folder=tmp_path, save_every=1)
    module = Module(shrink=(1, 63) if at >= 4 else None)
    resumed = fit(pruning(), module=module, steps=8, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(resumed).items())


def test_step_0_asks_the_task_and_only_for_training():
    module = Module()
    StructuredPruning(0.5, 0.25).setup(SimpleNamespace(), module, "validate")
    assert module.techniques.structured is None
    StructuredPruning(0.5, 0.25).setup(SimpleNamespace(), module, "fit")
    assert module.techniques.structured == (0.5, 0.25, 0.0)


@pytest.mark.parametrize(("what", "last"), [("at_step: 0", 1), ("at_step: 2", 1), ("blocks: 0.5", 0)])
def test_a_pruned_translation_run_resumes_validates_and_answers(tmp_path, what, last):
    """Encoder, decoder and cross-attention shrink, and everything that reads its checkpoint knows."""
    callback = f"{{class_path: StructuredPruning, init_args: {{{what}}}}}"
    settings = [
        "--model.encoder.preset=bert", "--checkpoint.every_n_steps=1", "--model.validation_sources=0",
        "--trainer.val_check_interval=4", f"--trainer.callbacks=[{callback}]", "--trainer.max_steps=4",
    ]  # fmt: skip
    cli = run_translation(tmp_path, "fit", *settings)
    folder = Path(cli.trainer.log_dir) / "checkpoints"
    whole = torch.load(folder / "step-00000004.ckpt", weights_only=True)
    assert whole["state_dict"][f"model.decoder.blocks.{last}.cross_attention.query.weight"].shape == (32, 64)
    assert whole["state_dict"][f"model.decoder.blocks.{last}.feed_forward.output.weight"].shape == (64, 128)
    assert f"model.decoder.blocks.{last + 1}.feed_forward.output.weight" not in whole["state_dict"]
    answers = leanbert.load(folder / "step-00000004.ckpt").translate(["Red cook"])
    assert answers[0]["source"] == "Red cook"
    loss = run_translation(tmp_path, "validate", "--ckpt_path=last", "--model.validation_sources=0")
    measured = loss.trainer.callback_metrics["val/loss"].item()
    assert measured == pytest.approx(cli.trainer.callback_metrics["val/loss"].item(), rel=1e-5)
    (folder / "step-00000004.ckpt").unlink()
    run_translation(tmp_path, "fit", *settings, f"--ckpt_path={folder / 'step-00000003.ckpt'}")
    again = torch.load(folder / "step-00000004.ckpt", weights_only=True)
    assert again["leanbert"]["encoder"] == whole["leanbert"]["encoder"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("heads", {"heads": 1.0}),
        ("heads", {"heads": 0.0, "neurons": 0.0}),
        ("neurons", {"neurons": -0.1}),
        ("blocks", {"blocks": 1.0}),
        ("blocks", {"blocks": 0.5, "at_step": 3}),
        ("at_step", {"at_step": -1}),
        ("importance", {"importance": "random"}),
        ("importance", {"importance": "taylor"}),
        ("importance_steps", {"importance_steps": 0}),
    ],
)
def test_senseless_settings_of_structured_pruning_are_named(setting, values):
    with pytest.raises(UserError, match=rf"^StructuredPruning\.{setting}: [^\n]*\.$"):
        StructuredPruning(**values)


def test_what_cannot_be_combined_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^StructuredPruning\.at_step: is 10, but the run has 10 steps"):
        fit(StructuredPruning(at_step=10))
    with pytest.raises(UserError, match=r"^StructuredPruning\.heads: 0\.1 of 2 heads and 0\.0 of 84 neurons is less"):
        fit(StructuredPruning(0.1, 0.0, at_step=2))
    fit(Watch(), steps=5, folder=tmp_path, save_every=5)
    with pytest.raises(UserError, match=r"^StructuredPruning\.at_step: 5, but the checkpoint is of step 5"):
        fit(StructuredPruning(at_step=5), ckpt_path=tmp_path / "step=5.ckpt")


@pytest.mark.parametrize("name", ["pruning", "pruning_2_4", "structured_pruning"])
def test_overlays_name_settings_that_exist(name):
    overlay = yaml.safe_load((SHIPPED[1] / "memory" / f"{name}.yaml").read_text())
    (callback,) = overlay["trainer"]["callbacks+"]
    kind = {each.__name__: each for each in (MagnitudePruning, StructuredPruning)}[
        callback["class_path"].split(".")[-1]
    ]
    kind(**callback["init_args"])
