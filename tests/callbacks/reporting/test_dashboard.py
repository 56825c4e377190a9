"""The page of curves, and the row of a run on the HParams page, as TensorBoard reads them."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.util import tensor_util

from leanbert.callbacks.reporting.dashboard import RESULTS_SHOWN, SETTINGS_SHOWN, page_layout
from tests.corpus import write_corpus
from tests.training import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 12 steps with one technique: its folder, and what it wrote."""
    folder = tmp_path_factory.mktemp("dashboard")
    write_corpus(folder / "train.txt")
    cli = fit(folder, "--trainer.val_check_interval=6", overlays=("checkpointing",), steps=12)
    log_dir = Path(cli.trainer.log_dir)
    return log_dir, EventAccumulator(str(log_dir), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_the_layout_has_loss_and_quality_above_memory(run):
    _, events = run
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor_util.make_ndarray(event.tensor_proto).item())
    charts = {part.title: {c.title: list(c.multiline.tag) for c in part.chart} for part in layout.category}
    assert list(charts) == ["Loss and quality", "Memory (MiB)", "Speed"]
    assert charts["Loss and quality"] == {
        "loss": ["train/loss", r"val/\w*loss$"],
        "perplexity": ["val/perplexity"],
        "accuracy": ["val/accuracy"],
    }
    logged = events.Tags()["scalars"]
    tags = {tag for part in charts.values() for tags in part.values() for tag in tags}
    shown = {tag: [one for one in logged if re.match(tag, one)] for tag in tags}
    assert all(shown.values())
    assert shown[r"val/\w*loss$"] == ["val/loss", "val/unigram_loss"]


def test_a_device_has_charts_of_its_own():
    cpu, cuda = page_layout([], "cpu", 1), page_layout([], "cuda", 1)
    assert list(cpu) == list(cuda)
    assert list(cpu["Loss and quality"]) == ["loss"]
    assert set(cuda["Memory (MiB)"]) - set(cpu["Memory (MiB)"]) == {"of the device"}
    assert set(cuda["Speed"]) - set(cpu["Speed"]) == {"allocation retries"}


def test_several_devices_have_charts_of_what_they_send():
    one, two = page_layout([], "cpu", 1), page_layout([], "cpu", 2)
    assert list(two) == [*one, "Communication"]
    assert set(two["Memory (MiB)"]) - set(one["Memory (MiB)"]) == {"of the fullest device"}


def test_metrics_of_parts_are_not_laid_out():
    charts = page_layout(["val/f1", "val/f1/ARG0", "train/loss", "average/f1"], "cpu", 1)["Loss and quality"]
    assert list(charts) == ["loss", "f1"]


def test_tasks_share_the_chart_of_their_losses():
    """TensorBoard shows charts of one title twice where their tags differ."""
    losses = [
        page_layout(tags, "cpu", 1)["Loss and quality"]["loss"]
        for tags in (["val/loss", "val/unigram_loss"], ["val/loss"])
    ]
    assert losses[0] == losses[1]


def test_the_row_has_techniques_and_sizes(run):
    _, events = run
    content = events.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    settings = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    parameters = settings.pop("parameters")
    assert parameters > 0
    assert settings == {
        "techniques": "ActivationCheckpointing", "optimizer": "adamw", "precision": "32-true", "learning_rate": 1e-3,
        "layers": 2, "hidden_size": 32, "max_length": 32, "batch_size": 8, "micro_batch": 8, "devices": 1, "seed": 0,
    }  # fmt: skip
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert {info.name for info in experiment.hparam_infos} == {*settings, "parameters"}
    assert {info.name for info in experiment.hparam_infos if info.differs} == set(SETTINGS_SHOWN)
    assert [info.name.tag for info in experiment.metric_infos] == list(RESULTS_SHOWN)
    end = metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG])
    assert end.status == api_pb2.STATUS_SUCCESS


def test_the_results_are_those_of_the_summary_and_there_is_no_run_below_the_run(run):
    folder, events = run
    summary = json.loads((folder / "summary.json").read_text())
    loss, peak, speed = (events.Scalars(tag)[-1].value for tag in RESULTS_SHOWN)
    assert loss == pytest.approx(summary["metrics"]["val/loss"])
    assert peak == pytest.approx(summary["peak_bytes"] / 2**20)
    assert speed == pytest.approx(summary["tokens_per_second"])
    assert len(list(folder.rglob("events.out.*"))) == 1
