"""The callback switches the rounding on when it is due, in a run that resumes too, and off at the end."""

import pytest
import torch

from leanbert.callbacks.techniques.quantization import QuantizationAwareTraining
from leanbert.errors import UserError
from tests.callbacks.techniques.test_pruning import Module, fit, state
from tests.corpus import write_corpus
from tests.training import fit as fit_run
from tests.training import scalars


def rounded_steps(module, steps):
    """Let a module note after how many steps each forward pass was rounded."""
    layer = module.model.encoder.blocks[0].attention.qkv

    def note(*_):
        steps[module.global_step] = layer.round_weight is not None

    layer.register_forward_pre_hook(note)


@pytest.mark.parametrize("start", [0, 3])
def test_weights_are_rounded_from_the_step_on_and_no_more_at_the_end(start):
    module, steps = Module(), {}
    rounded_steps(module, steps)
    fit(QuantizationAwareTraining("int4", start_step=start), module=module, steps=5)
    assert steps == {step: step >= start for step in range(5)}
    assert all(layer.round_weight is None for layer in module.model.modules() if hasattr(layer, "round_weight"))


def test_a_resumed_run_equals_one_that_was_not_killed(tmp_path):
    whole = fit(QuantizationAwareTraining("int8_int4", 2), folder=tmp_path, save_every=1, steps=6)
    plain = fit(steps=6)
    for at in (1, 2, 4):
        resumed = fit(QuantizationAwareTraining("int8_int4", 2), ckpt_path=tmp_path / f"step={at}.ckpt", steps=6)
        assert all(torch.equal(tensor, state(whole)[name]) for name, tensor in state(resumed).items()), at
    assert any(not torch.equal(tensor, state(whole)[name]) for name, tensor in state(plain).items())
    stored = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == plain.state_dict().keys()


def test_validation_in_training_is_that_of_rounded_weights(tmp_path):
    """From the one before step 1 on: weights that do not move have another loss, as they are stored and rounded."""
    write_corpus(tmp_path / "train.txt")
    losses = {}
    for scheme in (None, "int4"):
        given = [] if scheme is None else [
            f"--trainer.callbacks=[{{class_path: QuantizationAwareTraining, init_args: {{scheme: {scheme}}}}}]"
        ]  # fmt: skip
        run = fit_run(tmp_path, *given, f"--data.val_files={tmp_path / 'train.txt'}", "--model.optimizer.lr=0")
        losses[scheme] = scalars(run)["val/loss"]
    assert losses[None].keys() == losses["int4"].keys()
    assert {0, 4} <= losses[None].keys()
    assert all(1e-5 < abs(loss - losses["int4"][step]) < 0.1 for step, loss in losses[None].items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "int3"}, r"scheme: 'int3' is unknown\. Choose int8, int4, int8_int4\."),
        ({"start_step": -1}, r"start_step: "),
        ({"scheme": "int4", "inputs": True}, r"inputs: products of int4 read 32 bits\. Leave it out\."),
    ],
)
def test_senseless_settings_are_named(given, message):
    with pytest.raises(UserError, match=rf"^QuantizationAwareTraining\.{message}"):
        QuantizationAwareTraining(**given)


def test_a_run_that_ends_too_early_is_refused():
    with pytest.raises(UserError, match=r"^QuantizationAwareTraining\.start_step: 5 is after the last step"):
        fit(QuantizationAwareTraining(start_step=5), steps=5)
