"""From a command line to model, data and trainer."""

from __future__ import annotations

import re
import warnings
from functools import cached_property
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from leanbert import checkpoints
from leanbert.callbacks.loop.agreement import SameOnAllRanks
from leanbert.callbacks.loop.checkpoint import RunCheckpoint
from leanbert.callbacks.loop.interrupt import StopBetweenSteps
from leanbert.callbacks.loop.validation import ValidateAtEnds
from leanbert.callbacks.reporting.dashboard import Dashboard
from leanbert.callbacks.reporting.plan import PlanReport
from leanbert.callbacks.reporting.prediction import PredictionWriter
from leanbert.callbacks.reporting.progress import ProgressBar
from leanbert.callbacks.reporting.report import ConfigFile, RunSummary, StartReport
from leanbert.callbacks.reporting.samples import Samples
from leanbert.callbacks.reporting.step_monitor import StepMonitor
from leanbert.callbacks.techniques.allocator import ReturnFreedPages
from leanbert.callbacks.techniques.structured import StructuredPruning
from leanbert.callbacks.values import callbacks_of
from leanbert.class_paths import find_class, in_arguments
from leanbert.cli.arguments import complete
from leanbert.cli.budget import apply_budget, count_devices, planned_target, strategy_of
from leanbert.cli.help import SUBCOMMANDS
from leanbert.cli.launched import prepare_restarts, take_launched
from leanbert.cli.options import OPTIONS
from leanbert.cli.resume import Start, adopt_folder, adopt_start
from leanbert.compression.onnx.runtime import OnnxModel
from leanbert.data.module import RowData
from leanbert.data.pairs import TRAIN
from leanbert.data.workers import available_cpus
from leanbert.errors import UserError
from leanbert.memory.allocator import keep_freed_pages, return_freed_pages
from leanbert.memory.precision import default_precision
from leanbert.pretrained.build import read_model
from leanbert.ranges import GLOBAL_SEED
from leanbert.runs import TaskRuns
from leanbert.settings import (
    Parser,
    check_devices,
    device_type,
    find_shipped,
    refuse_duplicates,
    refuse_empty,
    user_error_within,
)
from leanbert.tasks.base import Task
from leanbert.tasks.teachers import START
from leanbert.trainer import Trainer

DEVICELESS = ("prepare", "plan", "export", "compress")
"""Subcommands that need no device."""


def whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Let a whole number be one where a fraction is allowed too: 4 batches, not 4.0, which would be a share.

    `typing` keeps of Optional[Union[int, float]] and its reverse the one named first: imports decide over Lightning's.
    """
    number = int | float | None
    for action in parser._actions:
        if getattr(action, "_typehint", None) == number:
            action._typehint = number  # type: ignore[attr-defined]


class Setup(LightningCLI):
    """LightningCLI with LeanBERT's subcommands, defaults and checks, until the subcommand's own work begins."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.start = Start()
        self.device_type: Any = "cpu"
        self.precision: Any = "32-true"
        self.planned_devices = 1
        self.planned_strategy: dict[str, Any] = {}
        self.plan_report: PlanReport | None = None
        try:
            super().__init__(
                trainer_class=Trainer,
                datamodule_class=LightningDataModule,
                subclass_mode_data=True,
                args=in_arguments(complete(find_shipped(arguments))),
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
        finally:
            if self.start.run is not None:
                self.start.run.release()

    # ---- parsers

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the subcommand that is called, or all: to make a parser takes a fifth of a second."""
        called = self.arguments[0] if self.arguments else ""
        return {name: set() for name in ([called] if called in SUBCOMMANDS else SUBCOMMANDS)}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Add the parsers of subcommands with our options, where Lightning's have those of the trainer's methods."""
        self._subcommand_parsers = {}
        commands = parser.add_subcommands()
        for name in self.subcommands():
            own = self._subcommand_parsers[name] = self.init_parser(description=SUBCOMMANDS[name])
            self._add_arguments(own)
            own.add_class_arguments(OPTIONS[name])
            commands.add_subcommand(name, own, help=SUBCOMMANDS[name])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the settings of checkpoints, which every run writes."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        whole_numbers_first(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse a seed out of range and a value nested more deeply than the parser can follow."""
        try:
            super().parse_arguments(parser, args)
        except RecursionError as error:
            raise UserError("a setting is nested too deeply. Give settings as --print_config shows them.") from error
        if not isinstance(seed := self._settings["seed_everything"], bool):
            GLOBAL_SEED.check("seed_everything", seed)

    # ---- before anything is built

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

    def _parse_ckpt_path(self) -> None:
        """Find and read the checkpoint; Lightning's own version would look for hyper-parameters in it."""
        which = self._settings["ckpt_path"]
        if self.config["subcommand"] == "fit":
            prepare_restarts(which)
        if which is not None:
            self.start.find(which, self.runs, self.config["subcommand"])
            self._settings["ckpt_path"] = None if self.start.folder is not None else self.start.path

    def before_instantiate_classes(self) -> None:
        """Check and complete the settings."""
        settings, trainer = self._settings, self._settings["trainer"]
        self._check(settings, trainer)
        take_launched(trainer, str(self.subcommand))
        if isinstance(self.start.folder, OnnxModel):
            check_for_onnx(trainer)
        self.device_type = device_type(trainer["accelerator"])
        if self.subcommand == "plan":
            self.planned_devices = count_devices(settings)
            self.planned_strategy = strategy_of(settings)
            self.device_type = planned_target(settings, self.device_type)
        self.hardware = {name: trainer[name] for name in ("accelerator", "devices", "strategy")}
        if self.subcommand in DEVICELESS:
            trainer["accelerator"], trainer["strategy"] = "cpu", "auto"
            trainer["devices"] = trainer["num_nodes"] = 1
        trains = self.subcommand in ("fit", "plan")  # answers shall not depend on the processor
        self.precision = trainer["precision"] or (default_precision(self.device_type) if trains else "32-true")
        for part in ("model", "data"):  # a seed of their own may be given
            own = settings[part]["init_args"]
            own["seed"] = own["seed"] or int(settings["seed_everything"])
        own = settings["model"]["init_args"]
        teacher = (own.get("distillation") or {}).get("teacher")
        _take_tokenizers(settings["data"]["init_args"], own["init_from"] or (None if teacher == START else teacher))
        if self.subcommand == "fit":
            if settings.pop("budget") is not None:  # what it chooses is saved, not it
                self.plan_report = apply_budget(settings, self.arguments)
        else:
            self.save_config_callback = None  # only a run has a folder
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # nothing is trained

    def _check(self, settings: Any, trainer: Any) -> None:
        """Raise UserError for settings that cannot be right together."""
        for part, base in (("model", Task), ("data", RowData)):
            refuse_empty(part, self._class_of(part, base), settings[part].get("init_args"))
        if trainer["accumulate_grad_batches"] != 1:
            raise UserError(
                "trainer.accumulate_grad_batches: would change the batch. data.batch_size is the batch of one "
                "optimizer step over all devices; leave this at 1."
            )
        refuse_duplicates(trainer["callbacks"] or [])
        check_devices(trainer)
        if trainer["enable_checkpointing"] is False:
            raise UserError("trainer.enable_checkpointing: every run writes checkpoints. See checkpoint.every_n_steps.")

    # ---- model, data and trainer

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what they refuse is raised as it is."""
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            needs = re.search(r"Problem with given class_path (.*?)\n  - ", str(error), re.DOTALL)
            unmade = UserError(needs[1]) if needs else None  # a class without the package that it needs
            raise user_error_within(error) or unmade or error from None

    def after_instantiate_classes(self) -> None:
        """Take tokenizers and, where nothing is trained, the architecture from the checkpoint."""
        torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
        shrinks = bool(callbacks_of(self.trainer, StructuredPruning))
        returns = callbacks_of(self.trainer, ReturnFreedPages)
        (return_freed_pages if returns else keep_freed_pages)()  # before preparation, which frees much
        if self.start.folder is not None:
            adopt_folder(self.model, self.datamodule, self.start.folder, str(self.start.path))
        elif self.start.checkpoint is not None:
            self.start.hand_over(self.model, self.datamodule, resumes=self.subcommand == "fit", shrinks=shrinks)
        elif self.model.init_from is not None:
            adopt_start(self.model, self.datamodule, self.model.init_from, str(self.subcommand))
        elif self.model.teacher_source not in (None, START):
            self.datamodule.start_from(read_model(self.model.teacher_source).metadata)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer with the callbacks that every run has, its run folder and its checkpoint files."""
        trainer = self._settings["trainer"]
        first = [SameOnAllRanks(self.resolved)] if self.subcommand == "fit" else []
        extra: dict[str, Any] = {
            "callbacks": [*first, *(self._get(self.config_init, "trainer")["callbacks"] or []), *self._callbacks()],
            "plugins": [
                *(trainer["plugins"] or []),
                checkpoints.StreamedCheckpointIO(self.start.path, self.start.checkpoint),
            ],
            "precision": self.precision,  # not a setting that is saved: another processor may have another default
            "enable_model_summary": False,
        }
        if self.subcommand != "fit" or trainer["logger"] in (None, True):
            extra["logger"] = False  # `fit` adds its own with the run's folder
        return super().instantiate_trainer(**extra)  # type: ignore[return-value]

    def resolved(self) -> dict[str, Any]:
        """Return all settings that the run has, by name."""
        return yaml.safe_load(self._parser(self.subcommand).dump(self._settings, skip_none=False))

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


def check_for_onnx(trainer: Any) -> None:
    """Let a model in ONNX files be computed on the CPU. Raises UserError for settings that are not for it."""
    if (device := trainer["accelerator"]) not in ("auto", "cpu"):
        raise UserError(
            f"trainer.accelerator: {device}, but the ONNX files of --ckpt_path are computed on the CPU. Set it to cpu, "
            "or give the checkpoint that they are of."
        )
    if (precision := trainer["precision"]) not in (None, 32, "32", "32-true"):
        raise UserError(
            f"trainer.precision: {precision}, but the ONNX files of --ckpt_path are computed as they were written. "
            "Leave it out."
        )
    trainer["accelerator"] = "cpu"


def _take_tokenizers(data: Any, source: str | None) -> None:
    """Let data without tokenizers of its own have the tokenizers of the model that it starts from."""
    if data["tokenizer"] is None:
        data["tokenizer"] = source
    may_have_own = source is not None and data.get("target_tokenizer", "") in (None, TRAIN)
    if may_have_own and read_model(str(source)).metadata.target_vocab_size is not None:
        data["target_tokenizer"] = source
