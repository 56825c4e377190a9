"""The command line: `python train.py SUBCOMMAND --config FILE ...`, the same as `leanbert SUBCOMMAND ...`."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import select
import shlex
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from leanbert import checkpoints, signals, strict_json
from leanbert.callbacks.loop.checkpoint import RunCheckpoint
from leanbert.callbacks.loop.interrupt import Interrupted, StopBetweenSteps
from leanbert.callbacks.loop.validation import ValidateAtEnds
from leanbert.callbacks.reporting.dashboard import Dashboard
from leanbert.callbacks.reporting.plan import PlanReport
from leanbert.callbacks.reporting.prediction import PredictionWriter
from leanbert.callbacks.reporting.progress import ProgressBar
from leanbert.callbacks.reporting.report import ConfigFile, RunSummary, StartReport, tagged
from leanbert.callbacks.reporting.samples import Samples
from leanbert.callbacks.reporting.step_monitor import StepMonitor
from leanbert.callbacks.techniques.allocator import ReturnFreedPages
from leanbert.callbacks.techniques.pruning import StructuredPruning
from leanbert.class_paths import find_class, in_arguments
from leanbert.data.module import RowData
from leanbert.data.pairs import TRAIN
from leanbert.data.workers import available_cpus
from leanbert.errors import TrainingFailed, UserError
from leanbert.files import DISK_FULL, scratch_folder
from leanbert.memory.allocator import keep_freed_pages, return_freed_pages
from leanbert.memory.precision import default_precision
from leanbert.messages import leads, say
from leanbert.models.config import EncoderConfig
from leanbert.planning.device import target_of
from leanbert.planning.run_settings import RunSettings
from leanbert.planning.timing import RunLength, count_validations, limited
from leanbert.pretrained.build import read_architecture, starting_config
from leanbert.runs import NAMES, Found, Run, TaskRuns
from leanbert.settings import (
    Parser,
    add_overlay,
    check_devices,
    device_type,
    find_shipped,
    one_line,
    refuse_duplicates,
    refuse_empty,
    user_error_within,
)
from leanbert.tasks.base import Task
from leanbert.trainer import Trainer

OWN_SUBCOMMANDS = ("prepare", "plan", "export")
"""What Lightning does not have; they need no device."""
LONGEST_MESSAGE = 1000
"""Characters of an error: what was given may be very long."""
READER_HAS_GONE = 141
"""Exit code where nobody reads standard output any longer, as behind `| head`: what a shell gives for SIGPIPE."""
FLAGS = ("--measure", "--prepare")
"""Options that are true where no value follows."""


class CLI(LightningCLI):
    """LightningCLI with LeanBERT's subcommands, defaults and run folders."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.checkpoint: dict[str, Any] | None = None
        self.run: Run | None = None  # that of the checkpoint, if training goes on in it
        self.resumed_step = 0
        self.device_type: Any = "cpu"
        self.precision: Any = "32-true"
        self.planned_devices = 1
        self.plan_report: PlanReport | None = None
        try:
            self._run_command()
        finally:
            if self.run is not None:
                self.run.release()

    def _run_command(self) -> None:
        super().__init__(
            trainer_class=Trainer,
            datamodule_class=LightningDataModule,
            subclass_mode_data=True,
            args=in_arguments(complete(find_shipped(self.arguments))),
            seed_everything_default=0,
            save_config_callback=ConfigFile,
            parser_class=Parser,
            parser_kwargs={"description": "LeanBERT trains BERT encoders inside a device-memory budget."},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # ranks take their share of a stream, see MaskedLMData
                "num_sanity_val_steps": 0,  # validation before step 1 is the check
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommands and the arguments that the configuration fills; the one that is called, if one is.

        A parser is made for each of them, which takes a third of a second.
        """
        known = LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in OWN_SUBCOMMANDS}
        called = self.arguments[0] if self.arguments else ""
        return {called: known[called]} if called in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of checkpoints, which every run writes."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    # ---- before anything is built

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse a value nested more deeply than the parser can follow."""
        try:
            super().parse_arguments(parser, args)
        except RecursionError as error:
            raise UserError("a setting is nested too deeply. Give settings as --print_config shows them.") from error

    def _parse_ckpt_path(self) -> None:
        """Find and read the checkpoint; Lightning's own version would look for hyper-parameters in it."""
        config = self._settings
        if config.get("ckpt_path") is None:
            return
        which = str(config["ckpt_path"])  # a file may be called 7
        fits = self.config["subcommand"] == "fit"
        found: Found | None = None
        if which not in NAMES:
            found = Found(Path(which), checkpoints.load(which))
            self.run = self.runs.owner(found.path) if fits else None
            if self.run is not None and leads():
                self.run.lock()
        elif fits:
            self.run, found = self.runs.find_to_train(which, lock=leads())
        else:
            found = self.runs.find(which)
        config["ckpt_path"], self.checkpoint = (None, None) if found is None else (str(found.path), found.checkpoint)
        if fits and self.checkpoint is not None and not self.checkpoint.keys() >= set(checkpoints.TRAINING_STATE):
            raise UserError(
                f"--ckpt_path: {config['ckpt_path']} holds weights only, from which training cannot go on. "
                "Use last, or start a new run from it with --model.init_from."
            )

    @property
    def _settings(self) -> Any:
        """The configuration of the chosen subcommand."""
        return self.config[self.config["subcommand"]]

    @cached_property
    def runs(self) -> TaskRuns:
        """The runs of this task below `trainer.default_root_dir`."""
        return TaskRuns(str(self._settings["trainer"]["default_root_dir"]), self._class_of("model", Task).name)

    def _class_of(self, part: str, base: type) -> Any:
        """Return the class of a part of the configuration. Raises UserError unless it is derived from `base`."""
        path = self._settings[part]["class_path"]
        found = find_class(path)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise UserError(
                f"{part}.class_path: {path} is none of LeanBERT. Derive it from {base.__module__}.{base.__name__}."
            )
        return found

    def before_instantiate_classes(self) -> None:
        """Check and complete the settings."""
        settings, trainer = self._settings, self._settings["trainer"]
        for part, base in (("model", Task), ("data", RowData)):
            refuse_empty(part, self._class_of(part, base), settings[part].get("init_args"))
        if trainer["accumulate_grad_batches"] != 1:
            raise UserError(
                "trainer.accumulate_grad_batches: would change the batch. data.batch_size is the batch of one "
                "optimizer step over all devices; leave this at 1."
            )
        refuse_duplicates(trainer["callbacks"] or [])
        check_devices(trainer)
        self.device_type = device_type(trainer["accelerator"])
        if self.subcommand == "plan":
            self._prepare_planning(settings)
        if self.subcommand in OWN_SUBCOMMANDS:
            trainer["accelerator"], trainer["devices"], trainer["strategy"] = "cpu", 1, "auto"
        trains = self.subcommand in ("fit", "plan")  # answers shall not depend on the processor
        self.precision = trainer["precision"] or (default_precision(self.device_type) if trains else "32-true")
        if trainer["enable_checkpointing"] is False:
            raise UserError("trainer.enable_checkpointing: every run writes checkpoints. See checkpoint.every_n_steps.")
        for part in ("model", "data"):  # a seed of their own may be given
            own = settings[part]["init_args"]
            own["seed"] = own["seed"] or int(settings["seed_everything"])
        data, model = settings["data"]["init_args"], settings["model"]["init_args"]
        if data["tokenizer"] is None:
            data["tokenizer"] = model["init_from"]
        source = model["init_from"]
        may_have_own = source is not None and data.get("target_tokenizer", "") in (None, TRAIN)
        if may_have_own and "target_vocab_size" in read_architecture(Path(source)).facts:
            data["target_tokenizer"] = source
        if self.subcommand == "fit" and settings.pop("budget") is not None:  # what it chooses is saved, not it
            self.plan_report = self._plan_and_apply(settings)
        if self.subcommand == "predict":
            settings["return_predictions"] = False  # they are written as they come
        if self.subcommand in ("validate", "test"):
            settings["verbose"] = False
        if self.subcommand != "fit":
            self.save_config_callback = None  # only a run has a folder
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # those of training

    def _prepare_planning(self, settings: Any) -> None:
        """Note the devices that are planned for, and plan on this CPU."""
        trainer = settings["trainer"]
        if settings["target"] != "auto":
            self.device_type = settings["target"]
        devices = settings["devices"] or trainer["devices"]
        if isinstance(devices, str):
            devices = int(devices) if devices.isdigit() else 1
        count = max(1, len(devices) if isinstance(devices, list) else devices)
        self.planned_devices = count * (settings["nodes"] or trainer["num_nodes"])
        rows = settings["data"]["init_args"]["batch_size"]
        if self.planned_devices < 1 or rows % self.planned_devices:
            raise UserError(
                f"data.batch_size: {rows} is not divisible by {self.planned_devices} devices. "
                f"Set a multiple of {max(1, self.planned_devices)}."
            )

    def _plan_and_apply(self, settings: Any) -> PlanReport:
        """Plan in a process of its own, whose memory is gone with it, and add the chosen techniques to the settings."""
        with scratch_folder() as folder:
            answer, overlay = folder / "plan.json", folder / "overlay.yaml"
            place = self.arguments.index("fit")
            command = [sys.executable, sys.argv[0], *self.arguments[:place], "plan", *self.arguments[place + 1 :]]
            done = subprocess.run(
                [*command, "--prepare=true", "--first=true", f"--json={answer}", f"--save={overlay}"], stdout=sys.stderr
            )
            if done.returncode:
                sys.exit(done.returncode)
            plan, chosen = json.loads(answer.read_text()), yaml.safe_load(overlay.read_text()) or {}
        add_overlay(settings, chosen)
        return PlanReport(plan["predicted_peak_bytes"], plan["predicted_needs_bytes"], plan["budget_bytes"], plan)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what they refuse is raised as it is."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            raise user_error_within(error) or error from None

    def after_instantiate_classes(self) -> None:
        """Take tokenizers and, where nothing is trained, the architecture from the checkpoint."""
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        returns = any(isinstance(callback, ReturnFreedPages) for callback in callbacks)
        (return_freed_pages if returns else keep_freed_pages)()  # before preparation, which frees much
        if self.checkpoint is None:
            if self.model.init_from is not None:
                self._adopt_start(self.model.init_from)
            return
        stored = self.checkpoint["leanbert"]
        path, resumes = self._settings["ckpt_path"], self.subcommand == "fit"
        self.datamodule.take_tokenizers(path, stored, resumes=resumes)
        self.datamodule.adopt({"max_length": stored["max_length"], **stored.get("data", {})})
        if self.subcommand == "fit" and self.model.init_from is None:
            self.model.shrinks = any(isinstance(callback, StructuredPruning) for callback in callbacks)
            self.model.resume_from(stored)  # before anything in the run's folder is touched
        else:
            self.model.encoder_config = EncoderConfig(**stored["encoder"])
            self.model.adopt(stored.get("model", {}))
        self.model.init_from = None
        self.resumed_step = self.checkpoint["global_step"]
        self.checkpoint = None  # Lightning has it

    def _adopt_start(self, source: str) -> None:
        """Take architecture, labels and the like from a model that is used as it is, or that training starts from."""
        stored = read_architecture(Path(source))
        trains = self.subcommand in ("fit", "prepare", "plan")
        if self.subcommand != "fit":  # which reads it with the weights
            config = starting_config(self.model.encoder_config, stored)
            self.model.encoder_config = EncoderConfig(**asdict(config))
        if stored.task == self.model.name:
            (self.datamodule.start_from if trains else self.datamodule.adopt)(stored.facts)
            if self.subcommand != "fit":
                self.model.adopt(stored.facts)
        elif self.subcommand == "predict":
            raise UserError(
                f"model.init_from: a model of task {stored.task}, which has nothing of {self.model.name} learnt. "
                "Give a trained one, or --ckpt_path."
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer with the callbacks that every run has, its run folder and its checkpoint files."""
        settings = self._settings["trainer"]
        extra: dict[str, Any] = {
            "callbacks": [*(self._get(self.config_init, "trainer")["callbacks"] or []), *self._callbacks()],
            "plugins": [
                *(settings["plugins"] or []),
                checkpoints.StreamedCheckpointIO(self._settings.get("ckpt_path"), self.checkpoint),
            ],
            "precision": self.precision,  # not a setting that is saved: another processor may have another default
            "enable_model_summary": False,
        }
        if self.subcommand != "fit" or settings["logger"] in (None, True):
            extra["logger"] = False  # `fit` adds its own with the run's folder
        return super().instantiate_trainer(**extra)  # type: ignore[return-value]

    def _callbacks(self) -> list[Any]:
        bar = [] if self._settings["trainer"]["enable_progress_bar"] is False else [ProgressBar()]
        if self.subcommand == "fit":
            return [
                *bar,
                StepMonitor(),
                ValidateAtEnds(),
                StartReport(),  # after the validation before step 1, from which it estimates the time
                Dashboard(),  # after it, too: it lays out the metrics that there are
                Samples(),
                RunSummary(),
                StopBetweenSteps(),
                *([self.plan_report] if self.plan_report is not None else []),
            ]
        return [*bar, *([PredictionWriter()] if self.subcommand == "predict" else [])]

    # ---- subcommands

    def fit(self, **kwargs: Any) -> None:
        """Train, unless the checkpoint is that of a finished run, which is left as it is."""
        trainer, most = self.trainer, self.trainer.max_steps
        if 0 < most <= self.resumed_step and (self.run is None or self.run.finished_at(self.resumed_step)):
            say(f"Finished: step {self.resumed_step:,} of trainer.max_steps {most:,}. Raise it to go on.")
            return
        is_new = self.run is None
        if leads():
            self._open_run()
        signals.hint(f"To go on:\n  {resume_command(self.arguments)}")
        try:
            trainer.fit(**kwargs)
        except (UserError, MisconfigurationException):
            if is_new and self.run is not None and trainer.global_step == 0:  # refused, not stopped
                self.run.discard()
            raise
        stop = next(c for c in trainer.callbacks if isinstance(c, StopBetweenSteps))  # type: ignore[attr-defined]
        if stop.received is not None:  # after the last step
            raise Interrupted(stop.received)
        self._say_how_to_go_on()

    def _open_run(self) -> None:
        """Give the trainer the folder of the run, a new one where none goes on, and its logger."""
        resumes = self.run is not None
        self.run = self.run or self.runs.create()
        folder = self.run.folder
        self.trainer.run_folder = folder  # type: ignore[attr-defined]
        if self._settings["trainer"]["logger"] in (None, True):
            # what was logged after the checkpoint is computed, and logged, again
            purge = (self.resumed_step and self.resumed_step + 1) if resumes else None
            root = folder.parent.parent
            logger = TensorBoardLogger(root, folder.parent.name, version=folder.name, purge_step=purge)
            self.trainer.loggers = [logger]

    def plan(self, **kwargs: Any) -> None:
        """Print what the run needs, and choose techniques for a budget; or sweep sizes and lengths."""
        from leanbert.planning.command import PlanRequest, run_plan, run_sweep  # only here: it is not needed to train

        request = PlanRequest(**{field.name: kwargs[field.name] for field in fields(PlanRequest)})
        target = target_of(self.device_type)  # before preparation, whose memory `fit` does not have
        if kwargs["prepare"]:
            self.datamodule.prepare()
        if request.sweep:
            run_sweep(self.run_settings(), target, request)
        else:
            run_plan(self.run_settings(), target, request, self.run_length if request.measure else None)

    def run_length(self) -> RunLength:
        """Return how many steps and validations `fit` would do; prepares the corpus."""
        trainer, data = self._settings["trainer"], copy.deepcopy(self.datamodule)
        data.setup("fit")
        steps = trainer["max_steps"] if trainer["max_steps"] > 0 else trainer["max_epochs"] * data.batches_per_epoch
        rows = data.hparams["val_batch_size"] or data.hparams["batch_size"]
        interval = trainer["val_check_interval"]
        return RunLength(
            steps=steps,
            validations=count_validations(
                steps, 1.0 if interval is None else interval, every_n_epochs=trainer["check_val_every_n_epoch"],
                batches_per_epoch=data.batches_per_epoch,
            ),
            batches_per_validation=limited(-(-data.statistics["val"].rows // rows), trainer["limit_val_batches"]),
        )  # fmt: skip

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
        )

    def validate(self, **kwargs: Any) -> None:
        """Print the metrics as one JSON line."""
        self.trainer.validate(**kwargs)
        print(strict_json.dumps(tagged(self.trainer.callback_metrics)))

    def test(self, **kwargs: Any) -> None:
        """Print the metrics as one JSON line."""
        self.trainer.test(**kwargs)
        print(strict_json.dumps(tagged(self.trainer.callback_metrics)))

    def _say_how_to_go_on(self) -> None:
        """Say what came out, where it is, and the next commands."""
        trainer: Any = self.trainer
        metrics = tagged(trainer.callback_metrics)
        if "val/loss" in metrics:
            say(self.model.closing_words(metrics))
        checkpoint = next(c for c in trainer.callbacks if isinstance(c, RunCheckpoint))
        program, configs = program_name(), config_arguments(self.arguments)
        say(f"Checkpoint   {checkpoint.last_path}")
        if checkpoint.average_path is not None:
            say(f"Average      {checkpoint.average_path}")
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            command = f"tensorboard --logdir {shlex.quote(str(self.runs.folder.parent))}"
            say(f"TensorBoard  {command}, then http://localhost:6006/#custom_scalars")
        example = shlex.quote(self.model.example.replace("[MASK]", self.datamodule.tokenizer.mask_token))
        say(f"Answers      echo {example} | {program} predict {configs} --ckpt_path last --data.predict_files -")


def complete(arguments: list[str]) -> list[str]:
    """Return the arguments with the words after `--sweep` as one list, and bare flags as true."""
    found: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        values = list(itertools.takewhile(lambda value: not value.startswith("-"), rest))
        if word == "--sweep":
            found.append(f"--sweep={json.dumps(values)}")
            del rest[: len(values)]
        else:
            found.append(f"{word}=true" if word in FLAGS and not values else word)
    return found


def program_name() -> str:
    """Return how the user calls this program."""
    return "leanbert" if Path(sys.argv[0]).name.startswith("leanbert") else f"python {sys.argv[0]}"


def config_arguments(arguments: list[str]) -> str:
    """Return the `--config` options and the run's root among `arguments`, as a shell would take them."""
    kept: list[str] = []
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config", "-c", "--trainer.default_root_dir"):
            kept += [name, value or arguments[index + 1]]
    return shlex.join(kept)


def resume_command(arguments: list[str]) -> str:
    """Return the command that goes on with the run that `arguments` started."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--ckpt_path="):
            skip = False
        elif argument == "--ckpt_path":
            skip = True
        else:
            kept.append(argument)
    return f"{program_name()} {shlex.join([*kept, '--ckpt_path', 'last'])}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one line on standard error and exit code 2."""
    restore = signals.install()
    quiet_libraries()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # --help shows the dataclasses' field texts
    given = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            CLI(given)
        finally:
            sys.stdout.flush()
    except Interrupted as stopped:
        say(f"Stopped by {stopped} and saved. To go on:\n  {resume_command(given)}")
        sys.exit(0 if signals.follows() else stopped.exit_code)  # a rank that fails is taken for a crash
    except TrainingFailed as error:
        fail(one_line(str(error)), error, code=1)
    except (UserError, MisconfigurationException) as error:
        fail(one_line(str(error)), error)
    except OSError as error:
        gone = isinstance(error, BrokenPipeError) and reader_has_gone()
        drop_output()
        if gone:
            sys.exit(READER_HAS_GONE)
        reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or one_line(str(error))
        fail(f"{error.filename or 'output'}: {reason}. Mend that, or choose another file or folder.", error)
    finally:
        if arguments is not None:  # called by a program, which goes on
            restore()


def fail(message: str, error: BaseException, code: int = 2) -> None:
    """Print the one line and leave with an exit code; LEANBERT_DEBUG=1 shows the traceback instead."""
    if os.environ.get("LEANBERT_DEBUG") == "1":
        raise error
    half = LONGEST_MESSAGE // 2
    say(f"error: {message if len(message) <= LONGEST_MESSAGE else f'{message[:half]} ... {message[-half:]}'}")
    sys.exit(code)


def drop_output() -> None:
    """Forget what cannot be written: Python would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def reader_has_gone() -> bool:
    """Return whether nobody reads standard output any longer."""
    if not hasattr(select, "poll"):  # Windows
        return True
    output = select.poll()
    output.register(1, 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


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
    ):
        warnings.filterwarnings("ignore", pattern)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
