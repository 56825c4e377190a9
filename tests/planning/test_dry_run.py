from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanbert.callbacks.techniques.activations import ActivationOffload
from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.data.pairs import PairData
from leanbert.measure.trace import LiveBytes
from leanbert.memory.layer_major import run_in_slices
from leanbert.models.config import EncoderConfig
from leanbert.models.kernels.loss import linear_cross_entropy_sum
from leanbert.planning.dry_run import dry_run
from leanbert.planning.fake import Fake
from leanbert.planning.run_settings import RunSettings
from leanbert.tasks.seq2seq import Seq2Seq
from tests.planning.test_predict import settings


def head(dtype: torch.dtype) -> LiveBytes:
    """Trace a chunked head: 40 targets in chunks of 4, each with several blocks of the vocabulary's gradient."""
    model = nn.Linear(64, 70_000, dtype=dtype)
    hidden = torch.zeros(40, 64, dtype=dtype, requires_grad=True)
    targets = torch.zeros(40, dtype=torch.int64)
    trace = LiveBytes(model, existing=[hidden, targets])
    yield trace
    with trace:
        loss = linear_cross_entropy_sum(hidden, model.weight, model.bias, targets, vocab_size=70_000, chunk=4)
        loss.backward()


def blocks() -> LiveBytes:
    """Trace layer-major execution of two blocks over 11 rows, two at a time."""

    class Block(nn.Linear):
        def forward(self, hidden, context):
            return super().forward(hidden).tanh()

    model = nn.Sequential(Block(16, 16), Block(16, 16))
    hidden = torch.zeros(11, 8, 16, requires_grad=True)
    trace = LiveBytes(model, existing=[hidden])
    yield trace
    with trace:
        out = hidden
        for block in model:
            out = run_in_slices(block, out, None, 2)
        out.sum().backward()


@pytest.mark.parametrize("work", [lambda: head(torch.float32), lambda: head(torch.bfloat16), blocks])
def test_shortened_loops_have_the_same_peak_and_count_the_same_operations(work):
    traces = []
    for mode in (Fake(), FakeTensorMode()):
        with mode:
            running = work()
            traces.append(next(running))
            mode.flops = traces[-1].flops
            list(running)
    few, whole = traces
    assert few.flops == whole.flops
    # a chunk leaves its loss behind, one number of 4 bytes: that of the chunks left out is missing
    assert 0 <= whole.timeline().peak_bytes - few.timeline().peak_bytes <= 8 * 4
    assert len(few.timeline().events) < len(whole.timeline().events)


@pytest.mark.parametrize(
    "names", [("layer_major", "optimizer_in_backward", "adamw_8bit"), ("lean",), ("chunked_head",)]
)
def test_a_step_with_shortened_loops_needs_what_the_whole_one_needs(names, monkeypatch):
    run = settings(*names, encoder={"num_layers": 3, "hidden_size": 64, "vocab_size": 40_000})
    few = dry_run(run, 16)
    monkeypatch.setattr(Fake, "shorten", lambda self, slices, alike: slices)
    whole = dry_run(run, 16)
    assert few.flops == whole.flops
    assert few.step.by_phase == pytest.approx(whole.step.by_phase, abs=64)
    assert len(few.step.events) < len(whole.step.events)


def test_encoder_and_decoder_offload_nowhere(tmp_path):
    config = EncoderConfig(num_layers=2, hidden_size=32, num_heads=2)
    data = PairData(vocab_size=300, max_length=32, batch_size=8)
    data.tokenizer = SimpleNamespace(vocab_size=300, pad_id=0)
    plain = RunSettings(Seq2Seq(encoder=config), data, (), "32-true")
    stored = replace(plain, callbacks=(ActivationOffload(folder=str(tmp_path)),))
    activations = [dry_run(run, 8).step.by_category["activations"] for run in (stored, plain)]
    assert activations[0] < activations[1]


def test_the_users_objects_stay_as_they_are():
    run = settings("accumulation", "structured_pruning")
    dry_run(run, 16)
    assert run.task.model is None
    assert run.data.hparams["batch_size"] == 16
    assert not hasattr(run.data, "tokenizer")
    assert run.callbacks[0].schedule == {0: 8}


def test_techniques_take_part_those_of_a_user_too_and_other_callbacks_do_not():
    class Watches(Callback):
        def setup(self, *_):
            raise AssertionError("asked")

    class KeepsInputs(TechniqueCallback):
        def register(self, techniques):
            techniques.keep = "input"

    plain = settings(encoder={"num_layers": 3})
    less, all_of_them = (
        dry_run(replace(plain, callbacks=callbacks), 16).step.by_category["activations"]
        for callbacks in ((Watches(), KeepsInputs()), (Watches(),))
    )
    assert less < all_of_them
