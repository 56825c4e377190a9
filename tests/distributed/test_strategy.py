"""Whole runs on two processes, sharded or not, against one process, through the program as users call it."""

from __future__ import annotations

import json
import re

import pytest
import torch

import leanbert
from leanbert import checkpoints
from tests.cli.program import run
from tests.corpus import write_corpus
from tests.training import TINY, read_scalars

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("launcher_socket")]

STEPS = 20
ALIKE = 1e-6
"""Relative difference of losses in float32, which are summed in another order."""
TASKS = {
    "mlm": [*TINY, "--data.train_files=train.txt"],
    "seq2seq": [
        "--config=configs/translation.yaml",
        *TINY,
        "--model.encoder.dropout=0",
        "--model.encoder.attention_dropout=0",
        "--model.validation_sources=9",
    ],
    "classification": [
        "--config=configs/classification.yaml",
        *TINY,
        "--data.max_length=64",
        "--model.encoder.dropout=0",
        "--model.encoder.attention_dropout=0",
    ],
}
ADAMW = ["--model.optimizer.name=adamw", "--model.optimizer.lr=1e-3"]
ALL = [*ADAMW, "--trainer.gradient_clip_val=0.5", "--config=configs/memory/checkpointing.yaml", "--config=micro.yaml"]
"""AdamW, clipped, with micro-batches and activation checkpointing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategy")
    write_corpus(folder / "train.txt")
    accumulation = "{class_path: GradientAccumulation, init_args: {micro_batch: 2}}"
    (folder / "micro.yaml").write_text(f"trainer:\n  callbacks+: [{accumulation}]\n")
    return folder


SHARDED = f"--trainer.strategy={json.dumps({'class_path': 'FullySharded', 'init_args': {'checkpoints': 'sharded'}})}"
"""Checkpoints to go on from are in shards."""


def fit(folder, root, task, *arguments, strategy=None, devices=2, steps=STEPS):
    """Train; return the run's folder."""
    where = ["--trainer.accelerator=cpu", f"--trainer.devices={devices if strategy else 1}"]
    if strategy:
        where.append(f"--config=configs/strategy/{strategy}.yaml")
    done = run(
        folder, "fit", *TASKS[task], *where, *arguments, f"--trainer.max_steps={steps}",
        f"--trainer.default_root_dir={root}", "--trainer.val_check_interval=10",
    )  # fmt: skip
    (folder / f"{root}.log").write_text(done.stderr)
    return folder / root / task / "version_0"


def alike(found, expected, rel=ALIKE, steps=None):
    for tag in ("train/loss", "val/loss"):
        wanted = {step: value for step, value in expected[tag].items() if steps is None or step in steps}
        assert found[tag].keys() >= wanted.keys()
        for step, value in wanted.items():
            assert found[tag][step] == pytest.approx(value, rel=rel), (tag, step)


@pytest.fixture(scope="module")
def alone(folder):
    return {task: read_scalars(fit(folder, f"one-{task}", task, *ALL)) for task in TASKS}


@pytest.mark.parametrize(("task", "strategy"), [("mlm", "ddp"), *((task, "fsdp") for task in TASKS)])
def test_two_processes_train_as_one(folder, alone, task, strategy):
    alike(read_scalars(fit(folder, f"{strategy}-{task}", task, *ALL, strategy=strategy)), alone[task])


FOUR = [each for each in ALL if "micro" not in each]  # two rows a device are a micro-batch


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_processes_train_as_one(folder, alone, strategy):
    alike(read_scalars(fit(folder, f"four-{strategy}", "mlm", *FOUR, strategy=strategy, devices=4)), alone["mlm"])


def test_four_processes_in_two_groups_train_as_one(folder, alone):
    groups = json.dumps({"class_path": "FullySharded", "init_args": {"replicas": 2}})
    arguments = [*FOUR, f"--trainer.strategy={groups}"]
    path = fit(folder, "groups", "mlm", *arguments, strategy="hsdp", devices=4)
    alike(read_scalars(path), alone["mlm"])
    run(folder, "plan", *TASKS["mlm"], *arguments, "--devices=4", "--prepare=true", "--json=groups.json")
    planned = json.loads((folder / "groups.json").read_text())
    measured = json.loads((path / "summary.json").read_text())["peak_bytes"]
    assert planned["predicted_peak_bytes"] == pytest.approx(measured, rel=0.03)


def test_muon_on_shards(folder):
    """As whole weights on two processes: the iteration makes more of how one process rounds sums."""
    arguments = ["--model.optimizer.name=muon", "--model.optimizer.lr=1e-3"]
    whole, shards = (
        read_scalars(fit(folder, f"{strategy}-muon", "mlm", *arguments, strategy=strategy))
        for strategy in ("ddp", "fsdp")
    )
    alike(shards, whole)


def test_mixed_precision_on_shards(folder):
    mixed = [*ADAMW, "--config=configs/memory/bf16_mixed.yaml"]
    exact, one, two = (
        read_scalars(fit(folder, f"bf16-{number}", "seq2seq", *given, strategy=strategy, steps=6))
        for number, (given, strategy) in enumerate(((ADAMW, None), (mixed, None), (mixed, "fsdp")))
    )
    alike(two, one, rel=0.005)
    assert two["train/loss"] != exact["train/loss"]
    alike(one, exact, rel=0.02)


def test_the_checkpoint_is_that_of_one_device(folder):
    paths = {
        strategy: fit(folder, f"file-{strategy}", "mlm", *ALL, strategy=strategy, steps=3)
        for strategy in (None, "fsdp")
    }
    one, two = (checkpoints.load(path / "checkpoints" / "step-00000003.ckpt") for path in paths.values())
    assert one.keys() == two.keys()
    assert one["leanbert"] == two["leanbert"]
    assert one["loops"] == two["loops"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-6)
    states = [checkpoint["optimizer_states"][0] for checkpoint in (one, two)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["steps"] == states[1]["steps"] == 3
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, entry in states[0]["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(states[1]["state"][number][name], value, rtol=1e-3, atol=1e-6)
    same = [*TASKS["mlm"], "--trainer.default_root_dir=file-fsdp", "--ckpt_path=last"]
    stated = json.loads((paths["fsdp"] / "summary.json").read_text())["metrics"]["val/loss"]
    assert json.loads(run(folder, "validate", *same).stdout)["val/loss"] == pytest.approx(stated, rel=ALIKE)
    sharded = ["--config=configs/strategy/fsdp.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    assert json.loads(run(folder, "validate", *same, *sharded).stdout)["val/loss"] == pytest.approx(stated, rel=ALIKE)
    assert leanbert.load(paths["fsdp"] / "checkpoints" / "step-00000003.ckpt").fill_mask(["the [MASK] sat"])


def test_shards_are_taken_as_the_file_is(folder):
    """The best checkpoint, one file, is of the same step."""
    path = fit(folder, "shards", "mlm", *ALL, SHARDED, strategy="fsdp", steps=4) / "checkpoints"
    shards, best = path / "step-00000004.ckpt", path / "best.ckpt"
    assert sorted(file.name for file in shards.iterdir()) == ["00000.safetensors", "00001.safetensors", "rest.ckpt"]
    one, two = checkpoints.load(best), checkpoints.load(shards)
    assert two.keys() - one.keys() == {"shards"}
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "leanbert"):
        same(two[part], one[part])
    same(leanbert.load(shards).model.state_dict(), leanbert.load(best).model.state_dict())

    def validated(*arguments):
        done = run(folder, "validate", *TASKS["mlm"], "--trainer.default_root_dir=shards", *arguments)
        return json.loads(done.stdout)["val/loss"], done.stderr

    expected, _ = validated("--ckpt_path=best")
    found, said = validated("--ckpt_path=last")
    assert found == expected
    assert "step-00000004.ckpt, step 4" in said
    here = ["--config=configs/strategy/fsdp.yaml", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    assert validated(f"--ckpt_path={shards}", *here)[0] == pytest.approx(expected, rel=ALIKE)
    for source in (shards, best):
        run(folder, "export", *TASKS["mlm"], f"--ckpt_path={source}", f"--output=from-{source.stem}")
    weights = [(folder / f"from-{source.stem}" / "model.safetensors").read_bytes() for source in (shards, best)]
    assert weights[0] == weights[1]
    content = bytearray((shards / "00001.safetensors").read_bytes())
    content[-1] ^= 1
    (shards / "00001.safetensors").write_bytes(content)
    _, said = validated("--ckpt_path=last")
    assert "best.ckpt, step 4; passed over, damaged: step-00000004.ckpt" in said


def same(found, expected):
    """Compare nested values, tensors bit by bit."""
    assert type(found) is type(expected) or isinstance(found, dict)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list):
        same(dict(enumerate(found)), dict(enumerate(expected)))
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_a_process_without_a_validation_row_runs_the_model_with_the_others(folder):
    record = {"tokens": ["Ada", "left"], "predicate": 1, "labels": ["B-A0", "B-V"]}
    for part, count in (("few_train", 8), ("few_val", 1)):
        (folder / f"{part}.jsonl").write_text(f"{json.dumps(record)}\n" * count)
    TASKS["srl"] = [
        "--config=configs/srl.yaml",
        *TINY,
        "--data.train_files=few_train.jsonl",
        "--data.val_files=few_val.jsonl",
    ]
    one, two = (read_scalars(fit(folder, f"few-{s}", "srl", *ADAMW, strategy=s, steps=2)) for s in (None, "fsdp"))
    alike(two, one)
    assert two["val/f1"].keys() == {0, 2}


def test_shards_are_half_of_what_one_process_holds(folder):
    held = []
    for strategy in (None, "fsdp"):
        fit(folder, f"held-{strategy}", "mlm", *ADAMW, "--config=configs/size/mini.yaml", strategy=strategy, steps=3)
        said = (folder / f"held-{strategy}.log").read_text()
        [update] = re.findall(r"^optimizer +([\d. ]+)$", said, re.MULTILINE)
        held.append(sum(map(float, update.split()[1:4])))  # parameters, optimizer, gradients
    assert held[0] > 10
    assert held[1] / held[0] == pytest.approx(0.5, abs=0.01)


def test_the_plan_foretells_what_each_device_needs(folder):
    adama = "{class_path: OptimizerInBackward, init_args: {accumulate: true}}"
    (folder / "adama.yaml").write_text(f"trainer:\n  callbacks+: [{adama}]\n")
    four = [*ADAMW, "--trainer.strategy=fsdp", "--config=micro.yaml", "--config=adama.yaml", "--data.batch_size=16"]
    for name, arguments, within in (("plain", ADAMW, 0.02), ("all", ALL, 0.02), ("adama", four, 0.05)):
        path = fit(folder, f"planned-{name}", "mlm", *arguments, strategy="fsdp", steps=4)
        measured = json.loads((path / "summary.json").read_text())["peak_bytes"]
        run(folder, "plan", *TASKS["mlm"], *arguments, "--devices=2", "--prepare=true", f"--json={name}.json")
        planned = json.loads((folder / f"{name}.json").read_text())["devices"]["fsdp2"]
        assert planned["predicted_peak_bytes"] == pytest.approx(measured, rel=within), name
        logged = read_scalars(path)
        [sent] = logged["communication/bytes_per_step"].values()
        assert 0 < sent - planned["sent_bytes_per_step"] < 100  # the loss and the number of targets
        assert 0 < logged["communication/wait_share"][3] < 1
        assert logged["memory/fullest_device_mib"][3] > 100
