import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from leanbert.callbacks.loop.validation import ValidateAtEnds
from leanbert.callbacks.techniques.accumulation import GradientAccumulation
from leanbert.callbacks.techniques.activations import ActivationCheckpointing
from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.techniques.precision import Precision
from leanbert.data.batches.labelled import LabelledCollator
from leanbert.data.batches.pairs import PairCollator
from leanbert.data.mlm import MaskedLMData
from leanbert.errors import UserError
from leanbert.planning import dry_run, timing
from leanbert.planning.dry_run import take_step
from leanbert.planning.run_settings import RunSettings
from leanbert.planning.timing import (
    PEAK_FLOPS,
    RunLength,
    StepTimes,
    count_validations,
    fill,
    limited,
    measure,
    peak_flops,
)
from leanbert.tasks.mlm import MaskedLM
from tests.tiny import tiny_config


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def settings(*callbacks, precision="32-true", rows=8, **changes):
    data = MaskedLMData(vocab_size=300, max_length=16, batch_size=rows, val_batch_size=4)
    return RunSettings(MaskedLM(encoder=tiny_config(**changes)), data, callbacks, precision)


@pytest.fixture
def staged(monkeypatch):
    """Steps and validation batches that take known times: (layers, rows) of each is noted, nothing is computed."""
    clock, seen = Clock(), []

    def step(task, trainer, batch, after_backward):
        assert task.training
        layers = task.model.config.num_layers
        seen.append((layers, len(batch)))
        first = seen.count(seen[-1]) == 1
        clock.now += (100 if first else 1) * len(batch) * (0.5 + 0.25 * layers)
        after_backward()
        clock.now += 2 + 3 * layers

    def validation_step(task, batch, index):
        assert not task.training
        assert not torch.is_grad_enabled()
        clock.now += 7 + len(batch) * task.model.config.num_layers

    monkeypatch.setattr(timing, "take_step", step)
    monkeypatch.setattr(MaskedLM, "validation_step", validation_step)
    return SimpleNamespace(clock=clock, seen=seen)


@pytest.mark.parametrize(
    ("layers", "timed"), [(1, {1}), (2, {2}), (4, {4}), (5, {2, 4}), (12, {2, 4})], ids=lambda value: str(value)
)
def test_extrapolation_over_blocks_is_exact(staged, layers, timed):
    times = measure(settings(num_layers=layers), clock=staged.clock)
    assert {stack for stack, _ in staged.seen} == timed
    assert times == StepTimes(8 * (0.5 + 0.25 * layers) + 2 + 3 * layers, 7 + 4 * layers)


def test_extrapolation_over_micro_batches_times_the_update_once(staged):
    times = measure(settings(GradientAccumulation(2), rows=12), clock=staged.clock)
    assert {rows for _, rows in staged.seen} == {4}
    assert times.step == 12 * (0.5 + 0.25 * 2) + 2 + 3 * 2


@pytest.mark.parametrize(
    ("changes", "callbacks", "timed"),
    [
        ({"local_window": 4, "global_every": 3}, (), {4, 7}),  # 10 - 4 is a multiple of three, and 7 - 4
        ({}, (ActivationCheckpointing(every=2),), {2, 4}),
    ],
)
def test_stacks_repeat_whole_periods(staged, changes, callbacks, timed):
    measure(settings(*callbacks, num_layers=10, **changes), clock=staged.clock)
    assert {layers for layers, _ in staged.seen} == timed


def test_noise_cannot_make_a_block_faster_than_nothing(staged, monkeypatch):
    def step(task, trainer, batch, after_backward):
        staged.clock.now += 10 - task.model.config.num_layers
        after_backward()

    monkeypatch.setattr(timing, "take_step", step)
    assert measure(settings(num_layers=12), clock=staged.clock).step == 8


def test_laps():
    clock = Clock()
    durations = iter([50.0, *[4.0] * 30])

    def lap():
        clock.now += next(durations)
        return clock.now

    assert timing._repeat(lap, clock) == [54, 58, 62]  # three, though two are long enough; the first does not count
    durations = iter([0.1] * 100)
    assert len(timing._repeat(lap, clock)) == timing.MOST_LAPS


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_measured_steps_train(monkeypatch, precision):
    run, weights, losses = settings(Precision(precision) if precision != "32-true" else GradientAccumulation(2)), [], []

    def noted(task, trainer, batch, after_backward):
        if precision == "16-mixed":
            assert trainer.strategy.precision_plugin.scaler is not None
        training_step = task.training_step

        def step(*given):
            out = training_step(*given)
            losses.append(float(out["step_loss"]))
            return out

        with monkeypatch.context() as patch:
            patch.setattr(task, "training_step", step)
            take_step(task, trainer, batch, after_backward)
        weights.append(task.model.encoder.embeddings.token.weight.detach().float().clone())

    monkeypatch.setattr(timing, "take_step", noted)
    monkeypatch.setattr(timing, "ENOUGH_SECONDS", 0.0)
    times = measure(run)
    assert times.step > 0
    assert times.validation_batch > 0
    assert len(losses) == 1 + timing.LEAST_LAPS
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert not torch.equal(weights[0], weights[-1])
    assert run.task.model is None
    assert not hasattr(run.data, "tokenizer")


class Slow(TechniqueCallback):
    """A technique that takes time around a step."""

    clock: Clock

    def on_train_batch_start(self, *_):
        Slow.clock.now += 30

    def on_train_batch_end(self, *_):
        Slow.clock.now += 400


def test_what_callbacks_do_around_a_step_counts(staged):
    Slow.clock = staged.clock
    assert measure(settings(Slow()), clock=staged.clock).step == 8 * (0.5 + 0.25 * 2) + 2 + 3 * 2 + 430


@pytest.mark.parametrize(("real", "device"), [(True, "cuda"), (False, "cpu")])
def test_real_steps_are_compiled_and_on_the_device(monkeypatch, real, device):
    make, asked = dry_run._trainer, []

    def trainer(settings, callbacks, device_type):
        asked.append(device_type)
        return make(settings, callbacks, "cpu")

    monkeypatch.setattr(dry_run, "_trainer", trainer)
    run = replace(settings(), device_type="cuda")
    run.task.compile_blocks = True
    task, _, _ = dry_run.stage(run, 8, None, real=real)
    assert asked == [device]
    assert task.compile_blocks is real


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_accelerator():
    times = measure(replace(settings(num_layers=5), device_type="cuda"))
    assert times.step > 0
    assert times.validation_batch > 0


def test_batches_are_valid_and_repeatable():
    data = settings().data
    one, other = (fill(data.blank_batch(64), 300) for _ in range(2))
    tensors, blank = one.tensors(), data.blank_batch(64).tensors()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other.tensors().items())
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in blank.items()}
    assert 0 <= one.inputs.input_ids.min() < 10
    assert 290 < one.inputs.input_ids.max() < 300
    assert (one.target_index.diff(dim=1) > 0).all()
    assert one.target_index.max() == 15
    assert torch.equal(one.targets, one.inputs.input_ids.gather(1, one.target_index))
    assert not one.inputs.document_ids.any()
    assert torch.equal(one.inputs.position_ids[5], torch.arange(16))


def test_batches_of_labels_and_of_pairs_are_valid():
    batch = fill(LabelledCollator(16, 4, 0, "single", 5).blank(3), 300)
    assert batch.targets.tolist() == [[0] * 4] * 3
    assert (batch.target_index.diff(dim=1) > 0).all()
    assert not batch.inputs.document_ids.any()
    pairs = fill(PairCollator((16, 8), (0, 0)).blank(3), 300, 7)
    assert pairs.decoder_inputs.position_ids.tolist() == [list(range(8))] * 3
    assert pairs.targets.min() == pairs.decoder_inputs.input_ids.min() == 0
    assert pairs.targets.max() == pairs.decoder_inputs.input_ids.max() == 6
    assert pairs.inputs.input_ids.max() > 100
    assert len({tuple(row) for row in pairs.decoder_inputs.input_ids.tolist()}) == 3


class Validations(BoringModel):
    def __init__(self):
        super().__init__()
        self.passes = self.batches = 0

    def on_validation_start(self):
        self.passes += 1

    def validation_step(self, batch, batch_idx):
        self.batches += 1

    def train_dataloader(self):
        return DataLoader(torch.randn(4, 32), batch_size=1)

    def val_dataloader(self):
        return DataLoader(torch.randn(5, 32), batch_size=1)


@pytest.mark.parametrize("limit", [None, 3, 9, 0.5])
@pytest.mark.parametrize(
    ("steps", "interval", "every_n_epochs"),
    [(10, 5, None), (11, 5, None), (3, 5, None), (9, 1.0, 1), (8, 1.0, 2), (14, 0.5, 2), (10, 0.5, 2), (11, 3, 1)],
)
def test_validations_and_their_batches_are_those_of_lightning(tmp_path, steps, interval, every_n_epochs, limit):
    model = Validations()
    Trainer(
        max_steps=steps, val_check_interval=interval, check_val_every_n_epoch=every_n_epochs, limit_val_batches=limit,
        callbacks=[ValidateAtEnds()], num_sanity_val_steps=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(model)  # fmt: skip
    assert count_validations(steps, interval, every_n_epochs=every_n_epochs, batches_per_epoch=4) == model.passes
    assert model.passes * limited(5, limit) == model.batches


def test_a_whole_run():
    times = StepTimes(step=2.0, validation_batch=0.5)
    assert RunLength(steps=500, validations=3, batches_per_validation=19).seconds(times) == 1000 + 28.5
    taught = RunLength(steps=500, validations=3, batches_per_validation=19, training_rows=100)
    assert taught.seconds(replace(times, teacher_row=0.25)) == 25 + 1000 + 28.5


def test_a_device_that_is_not_there():
    assert peak_flops("a100", "bf16-mixed") == 312e12
    assert peak_flops("a100", "32-true") == 19.5e12
    assert peak_flops("t4", "16-mixed") == 65e12
    with pytest.raises(UserError, match="h1000 is unknown") as caught:
        peak_flops("h1000", "bf16-mixed")
    assert all(name in str(caught.value) for name in PEAK_FLOPS)
