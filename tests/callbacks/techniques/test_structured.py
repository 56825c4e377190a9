from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import leanbert
from leanbert.callbacks.techniques.structured import StructuredPruning
from leanbert.compression.structured import taylor_importance
from leanbert.errors import UserError
from tests.callbacks.techniques.runs import Module, Watch, fit, state
from tests.tasks.test_seq2seq import run as run_translation
from tests.tiny import PlainTask, unequal_batch


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
        callback.on_before_optimizer_step(SimpleNamespace(global_step=step, precision_plugin=None), module, None)
        found = callback.state_dict()["scores"]
        assert found is None or all(torch.allclose(sums, times * one) for sums, one in zip(found, once, strict=True))
        assert (found is None) is (times == 0)


def test_a_step_whose_update_is_left_out_does_not_count():
    """On a CPU bad gradients are dropped, and a scaler leaves out what overflows."""
    module, callback = Module(), StructuredPruning(at_step=10, importance="taylor")
    scaled = SimpleNamespace(global_step=9, precision_plugin=SimpleNamespace(scaler=object()))
    callback.on_before_optimizer_step(SimpleNamespace(global_step=9, precision_plugin=None), module, None)
    assert callback.state_dict()["scores"] is None
    PlainTask(module.model).loss_sum(unequal_batch()).backward()
    weight = module.model.head.dense.weight
    weight.grad[0, 0] = torch.inf
    callback.on_before_optimizer_step(scaled, module, None)
    assert callback.state_dict()["scores"] is None
    weight.grad[0, 0] = 0.0
    callback.on_before_optimizer_step(scaled, module, None)
    assert all(scores.isfinite().all() for scores in callback.state_dict()["scores"])


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
