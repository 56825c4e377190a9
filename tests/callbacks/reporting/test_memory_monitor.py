"""Small runs in this process: what the monitor logs, writes and prints, and that it changes nothing."""

import gc

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from leanbert.callbacks.reporting.memory_monitor import MemoryMonitor, terminal_table
from leanbert.errors import UserError
from leanbert.measure.timeline import CATEGORIES, PHASES
from tests.tiny import PlainTask, tiny_model, unequal_batch

CATEGORY_TAGS = [f"memory/category/{name}_mib" for name in CATEGORIES]


class TinyTask(LightningModule):
    """Trains the tiny BERT; step `fails_at` runs out of memory after its forward pass."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.model = tiny_model(torch.float32, dropout=0.1)
        self.task, self.fails_at, self.losses = PlainTask(self.model), fails_at, []

    def training_step(self, batch, batch_idx):
        loss = self.task.loss_sum(batch)
        if batch_idx + 1 == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.task.loss_sum(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder, *callbacks, steps=5, fails_at=None):
    torch.manual_seed(3)
    task = TinyTask(fails_at)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", callbacks=list(callbacks), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
        logger=TensorBoardLogger(folder, "mlm"), val_check_interval=4, check_val_every_n_epoch=None,
    )  # fmt: skip
    batches = [unequal_batch(seed=seed) for seed in range(8)]
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(task, loader, DataLoader(batches[:2], batch_size=None))
    return task, trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of five steps, sampled at steps 2 and 3, validated after step 4; what it logged."""
    folder = tmp_path_factory.mktemp("run")
    gc.collect()  # models of other tests, which would go between the two samples
    monitor = MemoryMonitor(sample_every_n_steps=3)
    task, trainer = fit(folder, monitor)
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    return task, monitor, events.Reload()


def test_sampled_steps_are_logged_by_the_tags_of_the_contract(run):
    task, _, events = run
    phases = [f"memory/phase/{name}_peak_mib" for name in PHASES[:3]]
    for tag in (*CATEGORY_TAGS, *phases):
        assert [event.step for event in events.Scalars(tag)] == [2, 3], tag
    assert [event.step for event in events.Scalars("memory/peak_mib")] == [2, 3, 4]
    assert [event.step for event in events.Scalars("memory/phase/validation_peak_mib")] == [4]
    first = {tag: events.Scalars(tag)[0].value for tag in (*CATEGORY_TAGS, *phases, "memory/peak_mib")}
    assert sum(first[tag] for tag in CATEGORY_TAGS) == pytest.approx(first["memory/peak_mib"], rel=1e-6)
    assert max(first[tag] for tag in phases) == first["memory/peak_mib"]
    parameters = sum(parameter.nbytes for parameter in task.model.parameters())
    assert first["memory/category/parameters_mib"] == pytest.approx(parameters / 2**20)
    assert first["memory/category/optimizer_mib"] == pytest.approx(2 * parameters / 2**20, rel=1e-2)  # steps, too


def test_figures_and_table_are_written_once_where_the_peak_stays(run):
    _, _, events = run
    tags = events.Tags()
    assert {"memory/timeline", "memory/breakdown"} <= set(tags["images"])
    (image,) = events.Images("memory/timeline")
    assert (image.step, image.width, image.height) == (2, 1000, 625)
    table = events.Tensors("memory/activations_by_layer/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| encoder.blocks.1 |" in table


def test_the_peak_is_the_highest_so_far(run):
    _, monitor, events = run
    peaks = [event.value for event in events.Scalars("memory/peak_mib")]
    assert peaks == sorted(peaks)
    assert peaks[-1] == pytest.approx(monitor.summary()["peak_bytes"] / 2**20)


def test_the_summary_holds_whole_bytes(run):
    _, monitor, _ = run
    summary = monitor.summary()
    assert set(summary["by_phase"]) == set(PHASES)
    assert sum(summary["by_category"].values()) == summary["peak_bytes"] == max(summary["by_phase"].values())
    assert all(type(value) is int for part in ("by_phase", "by_category") for value in summary[part].values())


def test_training_is_the_same_with_and_without(tmp_path, run):
    task, _, _ = run
    plain, _ = fit(tmp_path)
    assert plain.losses == task.losses
    assert len(plain.losses) == 5
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), task.parameters(), strict=True))


def test_the_table_in_the_terminal(tmp_path, capsys):
    fit(tmp_path, MemoryMonitor(), steps=2)
    lines = capsys.readouterr().err.splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("Memory, MiB"))
    assert lines[header].split()[2:] == ["peak", *CATEGORIES]
    assert [line.split()[0] for line in lines[header + 1 : header + 4]] == ["forward", "backward", "optimizer"]
    row = {name: 2**20 * (index + 1) for index, name in enumerate(CATEGORIES)}
    assert terminal_table({"backward": row})[1].split() == ["backward", "15.0", "1.0", "2.0", "3.0", "4.0", "5.0"]


def test_a_run_of_one_step_says_that_nothing_was_measured(tmp_path, capsys):
    monitor = MemoryMonitor()
    fit(tmp_path, monitor, steps=1)
    assert "not measured: fewer than two steps" in capsys.readouterr().err
    assert monitor.summary() == {}


@pytest.mark.parametrize("fails_at", [2, 3])  # in the sampled step, and in one that is not
def test_out_of_memory_is_reported(tmp_path, capsys, fails_at):
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, MemoryMonitor(), fails_at=fails_at)
    text = (tmp_path / "mlm" / "version_0" / "oom.txt").read_text()
    assert text.strip() in capsys.readouterr().err
    assert text.startswith(f"Out of memory in step {fails_at}: CUDA out of memory.")
    shares = {line.split()[0]: float(line.split()[1]) for line in text.splitlines()[3:8]}
    parameters = sum(parameter.nbytes for parameter in tiny_model(torch.float32).parameters()) / 2**20
    assert shares["parameters"] == pytest.approx(parameters, abs=0.06)
    assert shares["optimizer"] == pytest.approx(2 * parameters, abs=0.06)
    assert shares["activations"] > 0.4  # those of the forward pass that autograd holds
    assert "encoder.blocks.1.feed_forward" in text  # named, too
    assert "activations: --config configs/memory/accumulation.yaml" in text
    assert "or --config configs/memory/checkpointing.yaml" in text
    torch.ones(1)  # no trace is left active
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_other_errors_are_not_reported(tmp_path):
    task_error = RuntimeError("shapes do not match")

    class Failing(MemoryMonitor):
        def on_before_backward(self, *_):
            raise task_error

    with pytest.raises(RuntimeError, match="shapes"):
        fit(tmp_path, Failing())
    assert not (tmp_path / "mlm" / "version_0" / "oom.txt").exists()


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"MemoryMonitor\.sample_every_n_steps: 0 is out of range\."):
        MemoryMonitor(sample_every_n_steps=0)
    with pytest.raises(UserError, match=r"MemoryMonitor\.cuda_snapshot: needs a CUDA device"):
        fit(tmp_path, MemoryMonitor(cuda_snapshot=True))
