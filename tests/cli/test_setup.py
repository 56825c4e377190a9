"""Settings from files and command line. Bad ones: one line, exit code 2, the setting and the fix."""

from typing import Union

import pytest
from jsonargparse import ArgumentParser

from leanbert.cli.app import CLI
from leanbert.cli.setup import whole_numbers_first
from leanbert.errors import UserError
from leanbert.settings import Parser, check_devices, readable
from tests.cli.program import refused, run
from tests.corpus import write_corpus
from tests.training import TINY

pytestmark = pytest.mark.usefixtures("launcher_socket")

SETTINGS = [
    (["--trainer.accumulate_grad_batches=2"], ["trainer.accumulate_grad_batches", "data.batch_size"]),
    (["--model.optimizer.name=lion"], ["model.optimizer", "adamw", "lion"]),
    (["--model.encoder.hidden_size=30", "--model.encoder.num_heads=4"], ["hidden_size", "30", "4"]),
    (["--data.max_length=1024"], ["data.max_length", "1024", "512"]),
    (["--data.no_such_setting=1"], ["no_such_setting"]),
    (["--data.mask_rate=1.5"], ["data.mask_rate", "1.5"]),
    (["--data.train_files=nowhere/*.txt"], ["nowhere/*.txt"]),
    (["--ckpt_path=none.ckpt"], ["none.ckpt"]),
    (["--ckpt_path=last"], ["--ckpt_path last"]),
    (["--checkpoint.keep=0"], ["checkpoint.keep"]),
    (["--data.mask_rate=null"], ["data.mask_rate", "null"]),
    (["--config=configs/srl.yaml", "--data.init_args.vocab_size=null"], ["data.vocab_size", "null"]),
    (["--model.encoder.num_layers=null"], ["model.encoder.num_layers", "None"]),
    (["--ckpt_path=2"], ["2: no such checkpoint"]),
    (["--model.optimizer.lr=-1"], ["model.optimizer.lr", "-1"]),
    (["--model.schedule.decay_share=2"], ["model.schedule.decay_share", "2"]),
    (["--trainer.enable_checkpointing=false"], ["trainer.enable_checkpointing", "checkpoint.every_n_steps"]),
    (["--config=configs/none.yaml"], ["configs/none.yaml", "configs/mlm.yaml"]),
    (["--trainer.accelerator=gpu"], ["gpu"]),
    (["--trainer.accelerator=abacus"], ["trainer.accelerator", "abacus", "cpu"]),
    (["--trainer.strategy=deepspeed"], ["trainer.strategy", "deepspeed", "ddp, fsdp or hsdp"]),
    (["--seed_everything=-1"], ["seed_everything", "-1", "4294967295"]),
    (["--trainer.logger=lightning.pytorch.loggers.WandbLogger"], ["WandbLogger", "wandb"]),
    (["--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val/none}}]"], ["val/none", "val/loss"]),
    (["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=5000"], ["val_check_interval", "5000"]),
    (["--trainer.strategy=magic"], ["trainer.strategy", "magic"]),
    (["--trainer.strategy=ddp_spawn"], ["trainer.strategy", "ddp_spawn"]),
    (
        ["--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy", "--trainer.devices=2"],
        ["trainer.strategy", "ModelParallelStrategy"],
    ),
    (["--model=lightning.pytorch.demos.boring_classes.BoringModel"], ["model.class_path", "BoringModel", "Task"]),
    (["--trainer.default_root_dir="], ["trainer.default_root_dir"]),
    (["--trainer.default_root_dir=/proc/leanbert"], ["/proc/leanbert"]),
    ([f"--trainer.default_root_dir={'x' * 5000}"], ["trainer.default_root_dir"]),
    (["--trainer.default_root_dir=~nosuchuser/x"], ["trainer.default_root_dir", "nosuchuser"]),
]


@pytest.mark.parametrize(("arguments", "says"), SETTINGS, ids=lambda value: value[0] if len(value) == 1 else "")
def test_bad_settings(tmp_path, arguments, says):
    write_corpus(tmp_path / "train.txt")
    refused(tmp_path, "fit", *TINY, "--data.train_files=train.txt", *arguments, says=says)


def test_a_strategy_may_be_the_path_of_its_class(tmp_path):
    trainer = {"accelerator": "cpu", "strategy": "lightning.pytorch.strategies.DDPStrategy"}
    check_devices(trainer)
    assert trainer["strategy"] == "ddp"


def test_without_a_configuration_one_is_named():
    message = readable("the following arguments are required: fit.data, fit.model")
    assert message.endswith(" fit.model. A configuration has them: --config configs/mlm.yaml, or that of another task.")


@pytest.mark.parametrize("given", ["blocks=0.5,train=3", "blocks=0.5 train=3", "[blocks=0.5, train=3"])
def test_what_is_no_list_is_shown_as_one(given):
    parser = Parser(exit_on_error=False)
    parser.add_argument("--steps", type=list[str] | None)
    with pytest.raises(UserError) as error:
        parser.parse_args([f"--steps={given}"])
    assert str(error.value) == """steps: Expected a list. Give --steps '["blocks=0.5", "train=3"]'."""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("strategy: {class_path: FullySharded, init_args: {depth: 2}}", "strategy: Option 'depth' is not accepted. "),
        ("callbacks+: [{class_path: LayerMajor, init_args: {depth: 2}}]", "callbacks: Option 'depth' is not acc"),
        ("strategy: {class_path: FullySharded, init_args: {replicas: x}}", "strategy.replicas: Expected a int - "),
    ],
)
def test_an_option_that_a_class_does_not_take_is_said_once(tmp_path, given, says):
    (tmp_path / "overlay.yaml").write_text(f"trainer:\n  {given}\n")
    line = refused(tmp_path, "fit", "--config=overlay.yaml", says=[])
    assert line.startswith(f"error: trainer.{says}")
    spelling = "is not accepted. Check its spelling; --help lists all settings."
    assert line.endswith(spelling if "depth" in given else "choose from 'nodes'.")
    assert line.count("spelling") == ("depth" in given)


def test_a_plan_is_not_made_for_a_folder(tmp_path):
    refused(tmp_path, "plan", "--json=.", says=["--json", "is a folder"])


def test_yaml_that_does_not_parse_and_unknown_keys(tmp_path):
    (tmp_path / "broken.yaml").write_text("trainer:\n  max_steps: [1\n")
    refused(tmp_path, "fit", "--config=broken.yaml", says=["broken.yaml"])
    (tmp_path / "unknown.yaml").write_text("trainer:\n  max_stepz: 1\n")
    refused(tmp_path, "fit", "--config=unknown.yaml", says=["max_stepz"])
    overlay = "trainer:\n  callbacks+:\n    - class_path: lightning.pytorch.callbacks.LearningRateMonitor\n"
    (tmp_path / "overlay.yaml").write_text(overlay)
    refused(tmp_path, "fit", "--config=overlay.yaml", "--config=overlay.yaml", says=["LearningRateMonitor", "2 times"])


def test_yaml_that_grows_without_bound(tmp_path):
    laughs = ["a0: &a0 [1, 2, 3]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))]
    texts = {"deep": f"trainer: {'[' * 3000}{']' * 3000}\n", "round": "trainer: &a [*a]\n", "laughs": "\n".join(laughs)}
    for name, reason in ("deep", "nested too deeply"), ("round", "nested too deeply"), ("laughs", "aliases"):
        (tmp_path / f"{name}.yaml").write_text(texts[name])
        refused(tmp_path, "fit", f"--config={name}.yaml", says=[f"{name}.yaml", reason])


@pytest.mark.parametrize("name", ["mini", "small", "base", "large"])
def test_print_config_takes_the_size(tmp_path, name):
    result = run(tmp_path, "fit", "--config", f"configs/size/{name}.yaml", "--print_config")
    sizes = {"mini": (4, 256), "small": (4, 512), "base": (12, 768), "large": (24, 1024)}[name]
    assert f"num_layers: {sizes[0]}\n" in result.stdout
    assert f"hidden_size: {sizes[1]}\n" in result.stdout


def test_a_whole_number_is_one_where_fractions_are_allowed_first():
    parser = ArgumentParser()
    parser.add_argument("--batches", type=Union[float, int, None])  # noqa: UP007
    assert isinstance(parser.parse_args(["--batches=4"]).batches, float)
    whole_numbers_first(parser)
    for text, value in (("4", 4), ("1", 1), ("0.5", 0.5), ("1.0", 1.0), ("null", None)):
        found = parser.parse_args([f"--batches={text}"]).batches
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("subcommand", ["fit", "compress"])
def test_a_metric_that_these_data_do_not_have_is_refused_before_they_are_read(tmp_path, subcommand):
    given = [f"--output={tmp_path / 'out'}"] if subcommand == "compress" else []
    with pytest.raises(UserError, match=r"^checkpoint\.monitor: val/accuracy is not logged where data\.problem is"):
        CLI([
            subcommand, "--config=configs/classification.yaml", "--data.problem=regression", *given,
            "--data.train_files=none.jsonl", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
        ])  # fmt: skip
    assert not list(tmp_path.iterdir())
