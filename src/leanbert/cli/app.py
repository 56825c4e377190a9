"""The command line: `python train.py SUBCOMMAND --config FILE ...`, the same as `leanbert SUBCOMMAND ...`."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from leanbert import signals, strict_json
from leanbert.callbacks.loop.checkpoint import RunCheckpoint
from leanbert.callbacks.loop.interrupt import Interrupted, StopBetweenSteps
from leanbert.callbacks.reporting.report import describe_corpora, tagged
from leanbert.callbacks.values import callbacks_of
from leanbert.cli.budget import run_length
from leanbert.cli.help import program_name
from leanbert.cli.options import (
    OPTIONS,
    CompressOptions,
    EvaluateOptions,
    ExportOptions,
    FitOptions,
    Options,
    PlanOptions,
)
from leanbert.cli.resume import command_with, config_arguments, how_to_go_on, resume_command
from leanbert.cli.setup import Setup
from leanbert.errors import UserError
from leanbert.files import expand
from leanbert.messages import leads, say
from leanbert.planning.device import target_of
from leanbert.planning.profile import find_profile
from leanbert.planning.run_settings import RunSettings
from leanbert.units import format_size

if TYPE_CHECKING:
    from leanbert.compression.steps import Step

CALIBRATION_BATCHES = 8
"""Of validation, for steps of `compress` that look at what a model computes inside."""


class CLI(Setup):
    """A command line, run: what each subcommand does with model, data and trainer."""

    def _run_subcommand(self, subcommand: str) -> None:
        kind, given = OPTIONS[subcommand], self.config_init[subcommand]
        options = kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})
        getattr(self, subcommand)(options)

    def fit(self, options: FitOptions) -> None:
        """Train, unless the checkpoint is that of a finished run, which is left as it is."""
        trainer, start, most = self.trainer, self.start, self.trainer.max_steps
        if 0 < most <= start.step and (start.run is None or start.run.finished_at(start.step)):
            say(f"Finished: step {start.step:,} of trainer.max_steps {most:,}. Raise it to go on.")
            return
        self.model.check_monitor(self._checkpoint.monitor, self.datamodule)
        is_new = start.run is None
        if leads():
            self._open_run()
        # not of this object: the last run's model would stay in memory
        signals.hint(partial(how_to_go_on, self.start.run, self.arguments))
        try:
            trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=options.ckpt_path)
        except (UserError, MisconfigurationException):
            if is_new and start.run is not None and trainer.global_step == 0:  # refused, not stopped
                start.run.discard()
            raise
        stop = callbacks_of(trainer, StopBetweenSteps)[0]
        if stop.received is not None:  # after the last step
            raise Interrupted(stop.received)
        self._say_how_to_go_on()

    def _open_run(self) -> None:
        """Give the trainer the folder of the run, a new one where none goes on, and its logger."""
        resumes = self.start.run is not None
        self.start.run = self.start.run or self.runs.create()
        folder = self.start.run.folder
        self.trainer.run_folder = folder  # type: ignore[attr-defined]
        if self._settings["trainer"]["logger"] in (None, True):
            # what was logged after the checkpoint is computed, and logged, again
            purge = (self.start.step and self.start.step + 1) if resumes else None
            root = folder.parent.parent
            logger = TensorBoardLogger(root, folder.parent.name, version=folder.name, purge_step=purge)
            self.trainer.loggers = [logger]

    def _say_how_to_go_on(self) -> None:
        """Say what came out, where it is, and the next commands."""
        trainer: Any = self.trainer
        metrics = tagged(trainer.callback_metrics)
        if "val/loss" in metrics:
            say(self.model.closing_words(metrics))
        checkpoint = self._checkpoint
        program, configs = program_name(), config_arguments(self.arguments)
        say(f"Checkpoint   {checkpoint.last_path}")
        if checkpoint.average_path is not None:
            say(f"Average      {checkpoint.average_path}")
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            command = f"tensorboard --logdir {shlex.quote(str(self.runs.folder.parent))}"
            say(f"TensorBoard  {command}, then http://localhost:6006/#custom_scalars")
        example = shlex.quote(self.model.example.replace("[MASK]", self.datamodule.tokenizer.mask_token))
        say(f"Answers      echo {example} | {program} predict {configs} --ckpt_path last --data.predict_files -")

    def validate(self, options: EvaluateOptions) -> None:
        """Print the metrics as one JSON line."""
        if self.subcommand == "test" and not is_overridden("test_step", self.model):
            raise UserError(f"test: {type(self.model).__name__} has no metrics but those of validation. Use validate.")
        self._say_if_untrained()
        evaluate = self.trainer.validate if self.subcommand == "validate" else self.trainer.test
        evaluate(self.model, datamodule=self.datamodule, ckpt_path=options.ckpt_path, verbose=False)
        if leads():  # all ranks have the same
            print(strict_json.dumps(tagged(self.trainer.callback_metrics)))

    test = validate

    def _say_if_untrained(self) -> None:
        if self.start.path is None and self.model.init_from is None:
            say("untrained   neither --ckpt_path nor --model.init_from is given: this is a new model")

    def predict(self, options: Options) -> None:
        """Write answers as they come."""
        self._say_if_untrained()
        self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=options.ckpt_path, return_predictions=False
        )

    def prepare(self, options: Options) -> None:
        """Build tokenizers and token cache, and say what is in it."""
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        for line in describe_corpora(self.datamodule):
            say(line)

    def plan(self, options: PlanOptions) -> None:
        """Print what the run needs, and choose techniques for a budget; or sweep sizes and lengths."""
        from leanbert.planning.command import run_plan, run_sweep  # only here: it is not needed to train

        for name in ("json", "save", "figure"):
            if (path := getattr(options, name)) is not None and Path(path).is_dir():
                raise UserError(f"--{name}: {path} is a folder. Give a file.")
        profile = find_profile(options.device, self.device_type)
        target = target_of(self.device_type, profile)  # before preparation, whose memory `fit` does not have
        if options.prepare:
            self.datamodule.prepare()
        if options.sweep:
            run_sweep(self.run_settings(), target, options)
        else:
            length = (lambda: run_length(self._settings["trainer"], self.datamodule)) if options.measure else None
            run_plan(self.run_settings(), target, options, length, profile)

    def run_settings(self) -> RunSettings:
        """Return what decides the memory of the run."""
        trainer = self._settings["trainer"]
        return RunSettings(
            task=self.model,
            data=self.datamodule,
            callbacks=tuple(self._get(self.config_init, "trainer")["callbacks"] or ()),
            precision=self.precision,
            clip=trainer["gradient_clip_val"],
            vocab_size=self.datamodule.planned_vocabulary(),
            device_type=self.device_type,
            rows=self.datamodule.hparams["batch_size"] // self.planned_devices,
            devices=self.planned_devices,
            **self.planned_strategy,
        )

    def export(self, options: ExportOptions) -> None:
        """Write a trained model in a standard format, and say where it is. Raises UserError if there is none."""
        from leanbert.api import load
        from leanbert.compression_report.measuring import bytes_of, weight_files

        load(self._trained()).export(options.output, options.format, options.quantize, options.exceptions or ())
        folder = expand(options.output, "output")
        files, size = ", ".join(file.name for file in weight_files(folder)), format_size(bytes_of(folder))
        say(f"Exported     {folder}: {files}, {size}, {options.quantize or 'float32'}")

    def compress(self, options: CompressOptions) -> None:
        """Make smaller variants of a trained model and report on them."""
        from leanbert.compression_report.command import run_compress
        from leanbert.compression_report.variants import Source

        best = self._checkpoint
        self.model.check_monitor(best.monitor, self.datamodule)
        source = Source(
            self._trained(), self._metrics_of, self._calibrate, self._train_student, best.monitor, best.sign,
            self.trainer.max_steps,
        )  # fmt: skip
        again = dict.fromkeys(("search", "sensitivity", "max_size", "max_latency", "max_drop", "steps", "exceptions"))
        run_compress(options, source, command_with(self.arguments, {**again, "ckpt_path": str(source.path)}))

    def _metrics_of(self, model: Any = None, test: bool = True) -> dict[str, float]:
        """Return the metrics of a model in place of the run's own, by tag; on test files too if asked and given."""
        if model is not None:
            self.model.model = model
        own = None if model is not None else self._settings["ckpt_path"]
        self.trainer.validate(self.model, datamodule=self.datamodule, ckpt_path=own, verbose=False)
        found = tagged(self.trainer.callback_metrics)
        if test and self.datamodule.hparams.get("test_files") is not None:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            found |= tagged(self.trainer.callback_metrics)
        return found

    def _calibrate(self, model: Any, after_backward: Callable[[], object] | None = None) -> None:
        """Run a model on the first batches of validation."""
        self.model.model = model
        with torch.set_grad_enabled(after_backward is not None):
            for batch in islice(self.datamodule.val_dataloader(), CALIBRATION_BATCHES):
                loss = self.model.loss_sum(batch)
                if after_backward is not None:
                    (loss / self.model.count_targets(batch)).backward()
                    after_backward()
                    model.zero_grad(set_to_none=True)

    def _train_student(self, cuts: Sequence[Step], steps: int, folder: Path) -> Path:
        """Train what the cuts leave of the model, on the devices that are set."""
        from leanbert.cli.training import student_settings, train_student

        given = self.resolved()
        given["trainer"] |= self.hardware
        # what was adopted from the model counts, not what the configuration says
        given["data"]["init_args"] |= {name: self.datamodule.hparams[name] for name in self.datamodule.fixed}
        made = [name for name in ("decoder_layers", "decoder_start", "copy") if hasattr(self.model, name)]
        given["model"]["init_args"] |= {name: getattr(self.model, name) for name in made}
        settings = student_settings(given, self._trained(), cuts, steps)
        return train_student(settings, cuts, self.model.name, folder)

    @property
    def _checkpoint(self) -> RunCheckpoint:
        """Return the callback that every trainer has."""
        return callbacks_of(self.trainer, RunCheckpoint)[0]

    def _trained(self) -> Path:
        """Return where the trained model is. Raises UserError if none is named."""
        if (source := self._settings["ckpt_path"] or self.model.init_from) is None:
            raise UserError(
                f"{self.subcommand}: no model is named. Give --ckpt_path (a file, last, best or average) or "
                "--model.init_from."
            )
        return Path(source)


def run(arguments: list[str]) -> None:
    """Do what the arguments say, which `help.answer` has not answered.

    Raises:
        UserError: Bad input.
        SystemExit: A signal has stopped the run, which is saved.
    """
    quiet_libraries()
    gc.freeze()  # what is imported stays: neither collections nor samples of memory look through it
    helps = any(part in word for word in arguments for part in ("-h", ".help", "print_config="))
    set_parsing_settings(docstring_parse_attribute_docstrings=helps)  # the dataclasses' field texts, slow to read
    try:
        CLI(arguments)
    except Interrupted as stopped:
        say(f"Stopped by {stopped} and saved. To go on:\n  {resume_command(arguments)}")
        sys.exit(stopped.exit_code if leads() else 0)  # another rank that failed would be taken for a crash
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def quiet_libraries() -> None:
    """Silence what would bury LeanBERT's own lines; warnings about the user's settings stay."""
    for pattern in (
        ".*LightningCLI's args parameter.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # what is logged is the same on all ranks
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
        ".*isn't allowed for logging.*",
        ".*IterableDataset.*__len__.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*torch.distributed.nn.functional.all_gather is deprecated.*",
        *(() if "SLURM_JOB_ID" in os.environ else (".*`srun` command is available.*",)),  # a login node has it too
    ):
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
