"""`compress` and `export` with layers that stay in 32 bits: the whole program."""

import json
import shlex

import pytest
import torch
import yaml

from leanbert.cli.app import CALIBRATION_BATCHES, CLI
from leanbert.compression import steps
from leanbert.compression.structured import add_importance, taylor_importance
from leanbert.compression_report import command as report
from leanbert.compression_report.report import answer_of
from leanbert.errors import UserError
from leanbert.units import format_size
from tests.training import TINY, fit, read_scalars


@pytest.mark.slow
def test_layers_are_reported_and_a_choice_is_exported_by_one_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "peak_memory", lambda path: (1, 1))
    monkeypatch.setattr(report, "answer_of", lambda rows, *more: answer_of([row for row in rows if row.steps], *more))
    (tmp_path / "train.txt").write_text("".join(f"the {i} tests of words {i * i}\n\n" for i in range(400)))
    checkpoint = fit(tmp_path, steps=4).runs.find("last").path
    given = [
        "--config=configs/mlm.yaml", *TINY, f"--data.train_files={tmp_path / 'train.txt'}",
        f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.accelerator=cpu", f"--ckpt_path={checkpoint}",
    ]  # fmt: skip
    left = '["encoder.blocks.1.feed_forward.output", "head"]'
    CLI([
        "compress", *given, f"--output={tmp_path / 'out'}", "--seconds=0.01", '--steps=["quantize=int8"]',
        "--sensitivity=true", f"--exceptions={left}", "--max_drop", "1000%",
    ])  # fmt: skip
    found = json.loads((tmp_path / "out/report.json").read_text())
    row = next(row for row in found["variants"] if row["name"] == "int8-except-2")
    (layers,) = found["sensitivity"]
    assert (row["exceptions"], layers["variant"], layers["choice"]) == (json.loads(left), "int8-except-2", None)
    again = shlex.split(found["answer"].partition("Made again by: ")[2])
    start = again.index("compress")
    assert again[start + 1 : start + len(given)] == given[:-1]
    assert again[start + len(given) :] == [
        f"--output={tmp_path / 'out'}", "--seconds=0.01", "--ckpt_path", str(checkpoint), "--steps",
        '["quantize=int8"]', "--exceptions", left,
    ]  # fmt: skip
    names = [effect["layer"] for effect in layers["effects"]]
    parts = ("attention.qkv", "attention.output", "feed_forward.input", "feed_forward.output")
    every = {f"encoder.blocks.{index}.{part}" for index in (0, 1) for part in parts}
    assert len(names) == len(set(names))
    assert set(names) == every - {"encoder.blocks.1.feed_forward.output"} | {"encoder.embeddings.token", "head.dense"}
    assert layers["metric"] == pytest.approx(found["variants"][0]["metrics"]["val/loss"], rel=1e-5)
    for effect in layers["effects"]:
        assert effect["drop"] == pytest.approx(effect["metric"] / layers["metric"] - 1.0)
    assert "## Sensitivity of int8-except-2" in (tmp_path / "out/report.md").read_text()
    again = ["export", *given, "--format=onnx", f"--output={tmp_path / 'again'}"]
    capsys.readouterr()
    CLI([*again, "--quantize=int8", f"--exceptions={left}"])
    size = format_size((tmp_path / "again/model.onnx").stat().st_size)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"Exported     {tmp_path / 'again'}: model.onnx, {size}, int8"
    files = [folder / "model.onnx" for folder in (tmp_path / "out/int8-except-2", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(UserError, match=r"^exceptions: 'encoder\.blocks\.7\.attention\.qkv' is no layer that int8"):
        CLI([*again, "--quantize=int8", '--exceptions=["encoder.blocks.7.attention.qkv"]'])
    with pytest.raises(UserError, match=r"^export: exceptions are of what --quantize does\. Give it too"):
        CLI([*again, f"--exceptions={left}"])


@pytest.mark.slow
def test_heads_leave_by_the_gradients_of_validation(tmp_path, monkeypatch):
    """Another importance than that of the weights, from the mean loss of each of the first batches."""
    monkeypatch.setattr(report, "peak_memory", lambda path: (1, 1))
    (tmp_path / "train.txt").write_text("".join(f"the {i} tests of words {i * i}\n\n" for i in range(400)))
    cli = fit(tmp_path, "--data.val_batch_size=1", steps=4)
    seen = []
    prune = steps.prune_structured
    monkeypatch.setattr(steps, "prune_structured", lambda *given: seen.append(given[-1]) or prune(*given))
    CLI([
        "compress", "--config=configs/mlm.yaml", *TINY, f"--data.train_files={tmp_path / 'train.txt'}",
        f"--data.cache_dir={tmp_path / 'cache'}", "--data.val_batch_size=1", "--trainer.accelerator=cpu",
        f"--ckpt_path={cli.runs.find('last').path}", f"--output={tmp_path / 'out'}", "--seconds=0.01",
        '--steps=["structured_pruning=0.5:taylor"]',
    ])  # fmt: skip
    (found,) = seen
    task, total = cli.model, None
    batches = list(cli.datamodule.val_dataloader())[:CALIBRATION_BATCHES]
    assert len(batches) > 1
    task.model.eval()
    for batch in batches:
        (task.loss_sum(batch) / task.count_targets(batch)).backward()
        total = add_importance(total, taylor_importance(task.model))
        task.model.zero_grad(set_to_none=True)
    for mine, theirs in zip(total, found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    rows = json.loads((tmp_path / "out/report.json").read_text())["variants"]
    assert rows[-1]["name"] == "structured_pruning-0.5-taylor"
    assert rows[-1]["parameters"] < rows[0]["parameters"]


@pytest.mark.slow
def test_training_rounds_as_the_last_step_does_and_static_scales_come_from_validation_data(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "peak_memory", lambda path: (1, 1))
    (tmp_path / "train.txt").write_text("".join(f"the {i} tests of words {i * i}\n\n" for i in range(400)))
    checkpoint = fit(tmp_path, steps=4).runs.find("last").path
    given = [
        "compress", "--config=configs/mlm.yaml", *TINY, f"--data.train_files={tmp_path / 'train.txt'}",
        f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.accelerator=cpu", f"--ckpt_path={checkpoint}",
        "--seconds=0.01",
    ]  # fmt: skip

    def rows(name, *more):
        CLI([*given, f"--output={tmp_path / name}", *more])
        found = json.loads((tmp_path / name / "report.json").read_text())
        return {row["name"]: row for row in found["variants"]}, found["sensitivity"]

    found, _ = rows("aware", '--steps=["quantization_aware=int4", "train=4", "quantize=int4"]')
    names = ["quantization_aware-int4+train-4", "quantization_aware-int4+train-4+int4"]
    assert [name for name, row in found.items() if row["steps"]] == names
    (root,) = (tmp_path / "aware/training").iterdir()
    (callback,) = [
        each for each in yaml.safe_load((root / "config.yaml").read_text())["trainer"]["callbacks"]
        if each["class_path"] == "QuantizationAwareTraining"
    ]  # fmt: skip
    assert callback["init_args"] == {"scheme": "int4"}
    losses = [scalars["val/loss"] for scalars in (found[name]["metrics"] for name in names)]
    logged = read_scalars(next((root / "mlm").iterdir()))["val/loss"]
    assert abs(logged[4] - losses[1]) < 0.2 * abs(logged[4] - losses[0])  # the run has seen what int4 makes of it

    found, (layers,) = rows("static", '--steps=["quantize=int8_static"]', "--sensitivity=true")
    assert found["int8_static"]["size_bytes"] < 0.5 * found["onnx"]["size_bytes"]
    assert abs(found["int8_static"]["drop"]) < 0.01
    assert len(layers["effects"]) == 2 * 4 + 3
