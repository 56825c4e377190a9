"""Going on: from a checkpoint, in the run it belongs to, or from a trained model; and the command that does so."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leanbert import checkpoints
from leanbert.checkpoints import TRAINING_STATE
from leanbert.cli.help import program_name
from leanbert.cli.launched import launched_by
from leanbert.compression.onnx.runtime import OnnxModel, holds_onnx, read_onnx
from leanbert.data.module import RowData
from leanbert.data.pairs import TARGET
from leanbert.errors import UserError
from leanbert.messages import leads, say
from leanbert.models.stored import Stored
from leanbert.pretrained.build import read_model, starting_config
from leanbert.pretrained.weights import holds_model, unpack
from leanbert.runs import NAMES, Found, Run, TaskRuns
from leanbert.shard_files import holds_shards
from leanbert.tasks.base import Task

TAKE_ONNX = ("validate", "test", "predict")
"""Subcommands for which a model in ONNX files is as good as any."""


class Start:
    """What a subcommand starts from: nothing, a checkpoint and the run that training goes on in, or a model folder."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.folder: Stored | OnnxModel | None = None
        self.run: Run | None = None
        self.step = 0

    def find(self, which: str, runs: TaskRuns, subcommand: str) -> None:
        """Find and read the checkpoint or folder, and lock the checkpoint's run where training goes on in it.

        Raises:
            UserError: There is none, it is damaged, or the subcommand cannot have it, as training that cannot go on.
        """
        found: Found | None = None
        trains = subcommand == "fit"
        if which not in NAMES and Path(which).is_dir() and not holds_shards(Path(which)):
            self.path, self.folder = which, read_folder(Path(which), subcommand)
            return
        if which not in NAMES:
            found = Found(Path(which), checkpoints.read(which, all_sums=leads() or not trains))
            self.run = runs.owner(found.path) if trains else None
            if self.run is not None and leads():
                self.run.lock()
        elif trains:
            self.run, found = runs.find_to_train(which, lock=leads())
        else:
            found = runs.find(which)
        if found is None:
            return
        self.path, self.checkpoint = str(found.path), found.checkpoint
        if not trains:
            self.checkpoint = {key: value for key, value in found.checkpoint.items() if key not in TRAINING_STATE}
        elif not self.checkpoint.keys() >= set(TRAINING_STATE):
            raise UserError(
                f"--ckpt_path: {self.path} holds weights only, from which training cannot go on. "
                "Use last, or start a new run from it with --model.init_from."
            )

    def hand_over(self, model: Task, data: RowData, *, resumes: bool, shrinks: bool) -> None:
        """Give model and data what the checkpoint fixes.

        A run `resumes` where its training goes on; `shrinks`: the model is pruned while it is trained.
        """
        assert self.checkpoint is not None
        path = str(self.path)
        stored = unpack(self.checkpoint, Path(path))
        data.take_tokenizers(path, self.checkpoint["leanbert"], resumes=resumes)
        data.adopt(stored.metadata)
        model.resumes = resumes
        if resumes and model.init_from is None:
            model.resume_from(stored, shrinks=shrinks)  # before anything in the run's folder is touched
        else:
            model.encoder_config = stored.config
            model.adopt(stored.metadata)
        model.init_from = None
        self.step = self.checkpoint["global_step"]
        self.checkpoint = None  # Lightning has it


def read_folder(folder: Path, subcommand: str) -> Stored | OnnxModel:
    """Return the model in a folder that `--ckpt_path` names. Raises UserError if a subcommand cannot have it."""
    if holds_onnx(folder):
        if subcommand not in TAKE_ONNX:
            raise UserError(
                f"--ckpt_path: {folder} holds ONNX files, which can be neither trained nor changed: only "
                f"{', '.join(TAKE_ONNX)} take them. Give {subcommand} the checkpoint that they are of"
            )
        return read_onnx(folder)
    if not holds_model(folder):
        raise UserError(f"--ckpt_path: {folder} is a folder without a model. Give a file, or what export has written")
    if subcommand == "fit":
        raise UserError(
            f"--ckpt_path: {folder} holds weights only, from which training cannot go on. Start a new run from it "
            "with --model.init_from"
        )
    return read_model(folder)


def adopt_folder(model: Task, data: RowData, stored: Stored | OnnxModel, path: str) -> None:
    """Give model and data what the model in the folder at `path` fixes, as a checkpoint does.

    Raises UserError if it is of another task.
    """
    metadata = stored.metadata
    if metadata.task != model.name:
        raise UserError(f"--ckpt_path: {path} is a model of task {metadata.task}, not {model.name}. Use its config.")
    separate = {} if metadata.target_vocab_size is None else {TARGET: path}
    data.take_tokenizers(path, separate, resumes=False)
    data.adopt(metadata)
    model.adopt(metadata)
    model.encoder_config, model.init_from = stored.config, path
    if isinstance(stored, OnnxModel):
        stored.config.check_length(data.hparams["max_length"])
        model.ready_model, model.init_from = stored, None


def adopt_start(model: Task, data: RowData, source: str, subcommand: str) -> None:
    """Take architecture, labels and the like from `source`, a model that is used as it is or where training starts.

    A line says so if it is not as large as the settings are. Raises UserError where it has learnt another task than the
    one that shall answer.
    """
    stored = read_model(source)
    metadata = stored.metadata
    layers, width = stored.config.num_layers, stored.config.hidden_size
    if (layers, width) != (model.encoder_config.num_layers, model.encoder_config.hidden_size):
        say(f"model.init_from: {source} has {layers} layers of {width}; of model.encoder only dropout counts")
    trains = subcommand in ("fit", "prepare", "plan")
    model.encoder_config = starting_config(model.encoder_config, stored)
    if metadata.task == model.name:
        (data.start_from if trains else data.adopt)(metadata)
        if subcommand != "fit":  # which refuses another decoder than is set
            model.adopt(metadata)
    elif subcommand == "predict":
        raise UserError(
            f"model.init_from: a model of task {metadata.task}, which has nothing of {model.name} learnt. "
            "Give a trained one, or --ckpt_path."
        )


def how_to_go_on(run: Run | None, arguments: list[str]) -> str:
    """Return what to do where a signal ends the run that `arguments` started, which may have no checkpoint yet."""
    if run is not None and not any(run.checkpoints.glob("*.ckpt")):
        return "Nothing is saved yet. Give the same command again."
    return f"To go on:\n  {resume_command(arguments)}"


def resume_command(arguments: list[str]) -> str:
    """Return the command that goes on with the run that `arguments` started."""
    return command_with(arguments, {"ckpt_path": "last"})


def command_with(arguments: list[str], options: Mapping[str, str | None]) -> str:
    """Return the command of `arguments` with other values of some options; None: without it."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or not (name.startswith("--") and name[2:] in options):
            kept += [] if skip else [argument]
            skip = False
        else:
            skip = not equals
    for name, value in options.items():
        kept += [] if value is None else [f"--{name}", value]
    starter, program = launched_by(), program_name()
    if starter is not None:  # whose options are not known here
        program = f"{starter} ... {program.removeprefix('python ') if starter == 'torchrun' else program}"
    return f"{program} {shlex.join(kept)}"


def config_arguments(arguments: list[str]) -> str:
    """Return the `--config` options and the run's root among `arguments`, as a shell would take them."""
    kept: list[str] = []
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config", "-c", "--trainer.default_root_dir"):
            kept += [name, value or arguments[index + 1]]
    return shlex.join(kept)
