"""`plan`, and `fit --budget`, as users call them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from leanbert.callbacks.reporting.plan import error_percent
from leanbert.class_paths import whole_path
from leanbert.cli.app import CLI, quiet_libraries
from leanbert.cli.arguments import complete
from leanbert.errors import UserError
from leanbert.planning.device import target_of
from leanbert.planning.search import _Trials, ladder
from leanbert.settings import add_overlay
from leanbert.units import MIB, parse_size
from tests import launcher
from tests.cli.program import run
from tests.corpus import write_corpus
from tests.training import read_scalars

pytestmark = pytest.mark.usefixtures("launcher_socket")
SHAPE = [
    "--model.encoder.num_layers=2", "--model.encoder.hidden_size=64", "--model.encoder.num_heads=2",
    "--data.vocab_size=300", "--data.batch_size=64", "--data.max_length=128", "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_corpus(folder / "train.txt", documents=600)
    return folder


@pytest.fixture(scope="module")
def planned(folder):
    """The plan of a tiny run, without a budget."""
    result = run(folder, "plan", *SHAPE, "--json=plan.json", program=launcher.PROGRAM)  # has the memory of its own
    return result, json.loads((folder / "plan.json").read_text())


def test_the_answer_for_programs_is_that_of_the_contract(planned):
    _, plan = planned
    assert plan["target"] == "cpu"
    assert plan["budget_bytes"] is None
    assert plan["fits"] is True
    assert plan["chosen"] == []
    assert plan["predicted_peak_bytes"] == max(plan["by_phase"].values()) == sum(plan["by_category"].values())
    assert plan["predicted_rss_bytes"] > plan["process_base_bytes"] + plan["predicted_peak_bytes"]
    assert plan["micro_batch_sequences"] == 64
    assert set(plan["by_phase"]) == {"forward", "backward", "optimizer", "validation"}
    assert 0 <= plan["by_category"]["parameters"] - 4 * plan["parameters"] < 10_000  # and buffers
    needs = [candidate["predicted_needs_bytes"] for candidate in plan["candidates"]]
    assert needs == sorted(needs, reverse=True)
    assert {"techniques", "predicted_peak_bytes", "added_compute", "fits"} <= set(plan["candidates"][0])


def test_the_answer_for_people_has_phases_candidates_and_costs(planned):
    printed = planned[0].stdout
    for word in ("backward", "activations", "micro-batch", "return_pages + accumulation", "What they cost"):
        assert word in printed


@pytest.mark.slow
def test_a_budget_changes_memory_and_nothing_else(folder, planned):
    """Effective batch, order and losses are those of the plain run."""
    budget = planned[1]["predicted_rss_bytes"] - 60 * MIB
    size = f"{budget // 2**20}MiB"
    arguments = [*SHAPE, "--data.train_files=train.txt", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1"]
    run(folder, "fit", *arguments, "--trainer.default_root_dir=plain")
    limited = [*arguments, "--trainer.default_root_dir=lean", f"--budget={size}"]
    done = run(folder, "fit", *limited, program=launcher.PROGRAM)
    assert "accumulation" in done.stderr.split("Budget")[1]
    plain, lean = (folder / name / "mlm" / "version_0" for name in ("plain", "lean"))
    before, after = read_scalars(plain), read_scalars(lean)
    for tag in ("train/loss", "val/loss"):
        assert after[tag] == pytest.approx(before[tag], rel=1e-5), tag
    summary = json.loads((lean / "summary.json").read_text())
    assert summary["effective_batch_sequences"] == 64
    assert summary["micro_batch_sequences"] < 64
    assert summary["peak_rss_bytes"] <= budget
    assert summary["peak_bytes"] == pytest.approx(summary["predicted_peak_bytes"], rel=0.04)
    assert list(after["memory/plan/predicted_mib"].values()) == [pytest.approx(summary["predicted_peak_bytes"] / MIB)]
    assert abs(next(iter(after["memory/plan/error_percent"].values()))) < 4
    kept = json.loads((lean / "plan.json").read_text())
    chosen = next(candidate for candidate in kept["candidates"] if candidate["fits"])
    assert chosen["techniques"] == kept["chosen"]
    callbacks = chosen["overlay"]["trainer"]["callbacks+"]
    assert {"micro_batch": summary["micro_batch_sequences"]} in [callback.get("init_args") for callback in callbacks]
    saved = (lean / "config.yaml").read_text()
    assert "GradientAccumulation" in saved
    assert "budget" not in saved


def choose(overlay):
    """Return what stands for the process that plans, and chooses an overlay."""

    def planned(command, **_):
        paths = dict(word.split("=", 1) for word in command if "=" in word)
        Path(paths["--save"]).write_text(yaml.safe_dump(overlay))
        answer = {"by_phase": {"forward": 2**20}, "predicted_needs_bytes": 2**30, "budget_bytes": 2**30}
        Path(paths["--json"]).write_text(json.dumps(answer))
        return subprocess.CompletedProcess(command, 0)

    return planned


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mlm", "translation"])
def test_every_rung_of_the_ladder_goes_through_fit(tmp_path, monkeypatch, task):
    """Also where the configuration sets no optimizer, and an overlay does."""
    quiet_libraries()
    write_corpus(tmp_path / "train.txt")
    rows = "".join(f"a {number} c\tc {number} a\n" for number in range(100))
    (tmp_path / "train.tsv").write_text(f"source\ttarget\n{rows}")
    files = {"mlm": "train.txt", "translation": "train.tsv"}[task]
    settings = [
        f"--config=configs/{task}.yaml", *SHAPE, "--data.batch_size=8", "--data.max_length=32", "--trainer.max_steps=2",
        "--trainer.limit_val_batches=1", f"--data.train_files={tmp_path / files}", f"--data.cache_dir={tmp_path}",
    ]  # fmt: skip
    if task == "translation":
        settings.append("--model.validation_sources=0")  # generating takes longer than all else
    run_settings = CLI(["plan", *settings]).run_settings()
    trials = _Trials(run_settings, target_of("cpu"))
    for number, techniques in enumerate(ladder(run_settings, target_of("cpu"))[1:]):
        overlay = trials._overlay(techniques, 4)
        monkeypatch.setattr("leanbert.cli.budget.subprocess.run", choose(overlay))
        root = tmp_path / str(number)
        trained = CLI(["fit", *settings, f"--trainer.default_root_dir={root}", "--budget=1GiB"])
        (summary,) = root.glob("*/version_0/summary.json")
        assert json.loads(summary.read_text())["status"] == "finished", techniques
        wanted = {whole_path(entry["class_path"]) for entry in overlay.get("trainer", {}).get("callbacks+", [])}
        made = {f"{type(c).__module__}.{type(c).__name__}" for c in trained.trainer.callbacks}
        assert wanted <= made
        optimizer = overlay.get("model", {}).get("init_args", {}).get("optimizer", {})
        assert optimizer.items() <= vars(trained.model.optimizer_config).items()


def test_the_subcommand_alone_is_another_one_in_the_process_that_plans(tmp_path, monkeypatch):
    commands = []

    def note(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 7)

    quiet_libraries()
    monkeypatch.setattr("leanbert.cli.budget.subprocess.run", note)
    monkeypatch.setattr("sys.argv", ["train.py"])
    given = ["fit", "--config=configs/mlm.yaml", "--data.text_field", "fit", "--budget=1GiB"]
    with pytest.raises(SystemExit) as stopped:
        CLI(given)
    assert stopped.value.code == 7
    assert commands[0][:6] == [sys.executable, "train.py", "plan", *given[1:4]]


def test_modules_of_the_working_folder_are_not_imported_while_planning(tmp_path):
    for name in ("yaml", "random"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w')\nraise SystemExit(9)\n")
    write_corpus(tmp_path / "train.txt")
    arguments = [*SHAPE, "--data.batch_size=2", "--data.train_files=train.txt", "--trainer.max_steps=1"]
    run(tmp_path, "fit", *arguments, "--budget=8GiB")
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_small_corpus_gives_fewer_entries_than_asked_for(folder):
    settings = [*SHAPE, "--data.train_files=train.txt", "--data.vocab_size=30000"]
    told = run(folder, "plan", *settings, "--json=asked.json")
    assert "Vocabulary   30,000 tokens, as data.vocab_size says" in told.stdout
    run(folder, "plan", *settings, "--prepare", "--json=there.json")
    asked, there = (json.loads((folder / name).read_text())["parameters"] for name in ("asked.json", "there.json"))
    run(folder, "fit", *settings, "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    (summary,) = (folder / "runs" / "mlm").glob("version_*/summary.json")
    assert there == json.loads(summary.read_text())["parameters"] < asked


@pytest.mark.slow
def test_a_sweep_finds_the_largest_micro_batch(folder):
    result = run(
        folder, "plan", *SHAPE, "--target=cuda", "--budget=1GiB", "--json=sweep.json", "--figure=out/sweep.png",
        "--sweep", "max_length=64,128",
    )  # fmt: skip
    cells = json.loads((folder / "sweep.json").read_text())["cells"]
    assert [cell["max_length"] for cell in cells] == [64, 128]
    assert cells[0]["micro_batch_sequences"] > cells[1]["micro_batch_sequences"] > 0
    for cell in cells:
        assert 0.97 * 2**30 < cell["predicted_needs_bytes"] <= 2**30
        assert f"{cell['micro_batch_sequences']}" in result.stdout
    assert (folder / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget=8GB"], "budget: '8GB' is no size"),
        (["--budget=lots"], "such as 512MiB or 8GiB"),
        (["--target=tpu"], "choose from"),
        (["--target=mps", "--budget=auto"], "there is no mps here"),
        (["--device=abacus"], "device: abacus is unknown"),
        (["--device=a100", "--share=0"], "share: 0.0 is out of range. Give a finite number"),
        (["--target=mps", "--measure=true"], "measure: times this machine's cpu"),
        (["--devices=3"], "not divisible by 3 devices"),
        (["--sweep", "size=mini"], "Give --budget"),
        (["--budget=1GiB", "--sweep", "size=huge"], "size 'huge' is unknown"),
        (["--budget=1GiB", "--sweep", "width=3"], "give size=mini,base,large"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(folder, arguments, says):
    result = run(folder, "plan", *SHAPE, *arguments, expect=2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert says in line


@pytest.mark.slow
def test_times_measured_and_estimated(folder):
    settings = [*SHAPE, "--data.train_files=train.txt", "--trainer.max_steps=40", "--trainer.limit_val_batches=1"]
    done = run(folder, "plan", *settings, "--data.batch_size=2", "--measure", "--json=time.json", "--device=a100")
    plan = json.loads((folder / "time.json").read_text())
    time = plan["time"]
    assert (time["steps"], time["validations"], time["batches_per_validation"]) == (40, 2, 1)
    assert time["tokens"] == 40 * 2 * 128
    parts = 40 * time["seconds_per_step"] + 2 * 1 * time["seconds_per_validation_batch"]
    assert time["seconds"] == pytest.approx(parts + time["start_seconds"])
    assert plan["estimate"]["seconds_per_step"] == pytest.approx(plan["flops_per_step"] / (0.3 * 19.5e12))
    assert "Time, measured here" in done.stdout
    assert "Time, estimated for a100 at 30 % of its peak" in done.stdout


def test_sizes_with_binary_units():
    assert parse_size("512MiB", "budget") == 512 * MIB
    assert parse_size(" 1.5 GiB", "budget") == 1.5 * 2**30
    for text in ("8GB", "0GiB", "-1GiB", "GiB", "8"):
        with pytest.raises(UserError, match="budget"):
            parse_size(text, "budget")


def test_words_of_a_sweep_are_one_list_and_a_flag_is_true():
    given = ["plan", "--sweep", "size=mini", "max_length=8", "--budget", "1GiB"]
    assert complete(given) == ["plan", '--sweep=["size=mini", "max_length=8"]', "--budget", "1GiB"]
    assert complete(["plan", "--measure", "--budget=1GiB"]) == ["plan", "--measure=true", "--budget=1GiB"]
    assert complete(["plan", "--measure", "false"]) == ["plan", "--measure", "false"]


def test_an_overlay_replaces_callbacks_of_its_kind():
    from jsonargparse import Namespace

    def callback(name, **arguments):
        return Namespace(class_path=name, init_args=Namespace(**arguments))

    settings = Namespace(
        model=Namespace(init_args=Namespace(optimizer=Namespace(name="muon", lr=0.02, weight_decay=0.1))),
        data=Namespace(init_args=Namespace(batch_size=8, val_batch_size=None)),
        trainer=Namespace(callbacks=[callback("a", x=1), callback("b", y=2)]),
    )
    overlay = {
        "model": {"init_args": {"optimizer": {"name": "adamw8bit", "lr": 1e-3}}},
        "data": {"init_args": {"val_batch_size": 4}},
        "trainer": {"callbacks+": [{"class_path": "b", "init_args": {"y": 3}}, {"class_path": "c"}]},
    }
    add_overlay(settings, overlay)
    assert settings.model.init_args.optimizer == Namespace(name="adamw8bit", lr=1e-3, weight_decay=0.1)
    assert settings.data.init_args == Namespace(batch_size=8, val_batch_size=4)
    assert settings.trainer.callbacks == [callback("a", x=1), callback("b", y=3), callback("c")]


def test_the_error_is_of_the_measured_value():
    assert error_percent(90, 100) == pytest.approx(-10)
    assert error_percent(120, 100) == pytest.approx(20)
