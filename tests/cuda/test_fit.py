"""Training on a GPU: the CPU's losses, no step for which the host waits, the memory that was planned."""

from __future__ import annotations

import gc

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from leanbert.cli.app import CLI
from leanbert.planning.predict import predict
from tests.corpus import write_corpus
from tests.training import fit, scalars

pytestmark = pytest.mark.cuda

ON_CUDA = ("--trainer.accelerator=cuda", "--data.num_workers=0")
LARGER = [
    "--model.encoder.num_layers=6", "--model.encoder.hidden_size=512", "--model.encoder.num_heads=8",
    "--model.encoder.max_positions=128", "--data.max_length=128", "--data.batch_size=64",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write_corpus(tmp_path / "train.txt")
    return tmp_path


@pytest.fixture
def start(folder):
    """A checkpoint: weights are drawn on the device that they are for, and each draws others."""
    root = f"--trainer.default_root_dir={folder / 'start'}"
    fit(folder, root, steps=1)
    return next((folder / "start").rglob("step-*.ckpt"))


class Watching(Callback):
    """Let CUDA raise an error where the host waits, from the third step to the sixth."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            torch.cuda.set_sync_debug_mode("default")


def losses(cli):
    return [value for _, value in sorted(scalars(cli)["train/loss"].items())]


def test_losses_are_those_of_the_cpu(folder, start):
    here = losses(fit(folder, f"--model.init_from={start}", steps=3))
    there = losses(fit(folder, f"--model.init_from={start}", *ON_CUDA, steps=3))
    assert len(here) == 3
    assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_losses_in_16_bits_are_near(folder, start, precision):
    here = losses(fit(folder, f"--model.init_from={start}", steps=3))
    there = losses(fit(folder, f"--model.init_from={start}", *ON_CUDA, f"--trainer.precision={precision}", steps=3))
    assert there == pytest.approx(here, rel=2e-2)


@pytest.mark.parametrize("overlays", [(), ("accumulation",), ("checkpointing", "chunked_head"), ("adamw_8bit",)])
def test_the_host_waits_for_no_step(folder, monkeypatch, overlays):
    made = CLI._callbacks
    monkeypatch.setattr(CLI, "_callbacks", lambda self: [*made(self), Watching()])
    try:
        cli = fit(folder, *ON_CUDA, "--trainer.precision=bf16-mixed", "--data.batch_size=16",
                  "--trainer.log_every_n_steps=100", overlays=overlays, steps=8)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cli.trainer.global_step == 8


class Planned(CLI):
    """The command line, which keeps what a plan predicts."""

    def plan(self, options):
        self.prediction = predict(self.run_settings())


def test_what_was_planned_is_allocated(folder):
    text = f"--data.train_files={folder / 'train.txt'}"
    words = ["--config=configs/mlm.yaml", "--trainer.callbacks=[]", "--trainer.precision=bf16-mixed", text, *LARGER]
    first = [*words, "--model.optimizer.name=adamw", "--data.vocab_size=2000", f"--data.cache_dir={folder / 'cache'}"]
    planned = Planned(["plan", *first, "--target=cuda", "--prepare=true"]).prediction.peak_bytes
    for _ in range(2):  # of the first one cuBLAS keeps its workspaces, which are no tensors
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit(folder, "--trainer.callbacks=[]", *LARGER, *ON_CUDA, "--trainer.precision=bf16-mixed",
            "--data.vocab_size=2000", "--trainer.limit_val_batches=1", steps=3)  # fmt: skip
        allocated = torch.cuda.max_memory_allocated() - before
    assert planned == pytest.approx(allocated, rel=0.03)
