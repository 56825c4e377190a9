"""Lightning's Trainer with the subcommands that Lightning does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from leanbert import signals
from leanbert.callbacks.loop.bad_steps import StopOnBadSteps
from leanbert.errors import UserError
from leanbert.ranges import COUNT, NOT_NEGATIVE, SHARE, WHOLE, Range

RANGES = {
    **dict.fromkeys(("num_nodes", "log_every_n_steps", "check_val_every_n_epoch"), COUNT),
    **dict.fromkeys(("min_steps", "min_epochs", "reload_dataloaders_every_n_epochs"), WHOLE),
    "gradient_clip_val": NOT_NEGATIVE,
}
"""Ranges of Lightning's settings, which takes other numbers without a word."""
NO_LIMIT = -1
"""Value of Lightning's settings for "all", where less than 1 is senseless otherwise."""
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
"""Batches if whole, else shares of all batches."""


class _Loop(_FitLoop):
    """Lightning's loop, which starts and ends also where no step is left: what a kill has prevented is made up then."""

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 or self.max_batches == 0


class _Signals(_SignalConnector):
    """Lightning's signals, but SIGTERM: its handler would wait for the other ranks, and `predict` would go on."""

    def register_signal_handlers(self) -> None:
        own = signals.handlers()
        super().register_signal_handlers()
        signals.give_back(own)


class Trainer(pl.Trainer):
    """Lightning's Trainer, with `prepare`, `plan`, `export`, a budget for `fit`, and the run's folder as `log_dir`.

    Args:
        max_bad_steps: Steps in a row whose loss or gradient is not finite, after which a run stops with exit code 1 and
            keeps the last one's batch in `bad_batch.pt`. Such a step leaves the weights alone.
        callbacks: What else happens around steps, a list or one.
        settings: See Lightning's Trainer.

    """

    run_folder: Path | None = None
    """Where `fit` writes, on the first rank."""

    def __init__(
        self, max_bad_steps: int = 3, callbacks: list[Callback] | Callback | None = None, **settings: Any
    ) -> None:
        _check_ranges(settings)
        given = [callbacks] if isinstance(callbacks, Callback) else callbacks or []
        super().__init__(callbacks=[*given, StopOnBadSteps(max_bad_steps)], **settings)
        loop, self.fit_loop = self.fit_loop, _Loop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        self.fit_loop.epoch_loop = loop.epoch_loop
        self._signal_connector = _Signals(self)

    @property
    def log_dir(self) -> str | None:
        """The run's folder, on every rank that of the first, whatever the loggers are. All ranks ask together."""
        folder = self.strategy.broadcast(self.run_folder) if self.state.fn == "fit" else None
        return super().log_dir if folder is None else str(folder)

    def prepare(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Build tokenizer and token cache only; needs no accelerator, so it suits a login node.

        Args:
            model: The task.
            datamodule: The data.
            ckpt_path: Checkpoint whose tokenizer is used.
            weights_only: Not used; `fit` saves it in the configuration.
        """
        datamodule.prepare_data()

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: Any = None,
        weights_only: bool | None = None,
        budget: str | None = None,
    ) -> None:
        """Train.

        Args:
            model: The task.
            train_dataloaders: Not used; the data module has them.
            val_dataloaders: Not used; the data module has them.
            datamodule: The data.
            ckpt_path: Checkpoint to go on from: a file, or `last` or `best` of the newest run; auto: last, or a new run
                where there is none.
            weights_only: Not used: checkpoints never execute code.
            budget: Memory that the run may need, such as 8GiB: the cheapest set of techniques that fits is applied, as
                `plan` shows it. auto: what the device has free, less a tenth. On a CPU it is resident memory.
        """
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        budget: str | None = None,
        target: Literal["auto", "cpu", "cuda", "mps"] = "auto",
        json: Path | None = None,
        save: Path | None = None,
        nodes: int | None = None,
        devices: int | None = None,
        sweep: list[str] | None = None,
        figure: Path | None = None,
        measure: bool = False,
        prepare: bool = False,
        first: bool = False,
        device: str | None = None,
        share: float = 0.3,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what memory a run needs, before anything is allocated, and which techniques fit it into a budget.

        Args:
            model: The task.
            datamodule: The data.
            budget: Memory that the run may need, such as 8GiB; auto: what the device has free, less a tenth. On a CPU
                it is resident memory.
            target: Kind of device, which need not be here. auto: that of trainer.accelerator.
            json: File to write the plan to, for programs.
            save: File to write the chosen techniques to, as an overlay for --config.
            nodes: Machines that share the batch. Default: trainer.num_nodes.
            devices: Devices of each. Default: trainer.devices. With more than one in all the plan says what each
                needs and sends under DDP and FSDP2.
            sweep: Print the largest micro-batch that fits the budget for each size and length instead:
                --sweep size=mini,base,large max_length=128,512.
            figure: Image file to draw the sweep into, such as sweep.png.
            measure: Time a few real steps of small stacks of blocks on this device, and say how long the run will
                take; the corpus is prepared first.
            prepare: Prepare the corpus first, so that the size of the tokenizer trained on it counts instead of
                data.vocab_size.
            first: Stop at the cheapest set of techniques that fits, as `fit --budget` does, instead of trying all.
            device: Estimate the time on a device that need not be here, such as t4, rtx4090, a100, h100-sxm.
            share: Share of that device's peak that training is taken to reach.
            ckpt_path: Checkpoint whose architecture counts.
            weights_only: Not used; `fit` saves it in the configuration.
        """
        raise NotImplementedError("the command line plans, see leanbert.planning.command")

    def export(
        self,
        model: LightningModule,
        output: str,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        format: Literal["hf"] = "hf",
    ) -> None:
        """Write a trained model in a standard format.

        Args:
            model: The task.
            output: Folder to write; it is created.
            datamodule: Not used.
            ckpt_path: Checkpoint file, or `last`, `best` or `average` of the newest run; else --model.init_from is
                exported.
            weights_only: Not used; `fit` saves it in the configuration.
            format: hf: config.json, model.safetensors and the tokenizer, as `transformers` loads them.

        """
        from leanbert.api import load

        source = ckpt_path or getattr(model, "init_from", None)
        if source is None:
            raise UserError(
                "export: nothing to export. Give --ckpt_path (a file, last, best or average) or --model.init_from."
            )
        load(source).export(Path(output))


def _check_ranges(settings: dict[str, Any]) -> None:
    """Raise UserError for a number that Lightning would take and that makes no sense."""
    for name, allowed in RANGES.items():
        allowed.check(f"trainer.{name}", settings.get(name))
    for name in ("max_steps", "max_epochs"):
        if settings.get(name) != NO_LIMIT:
            COUNT.check(f"trainer.{name}", settings.get(name))
    for name in LIMITS:
        value = settings.get(name)
        (SHARE if isinstance(value, float) else WHOLE).check(f"trainer.{name}", value)
    interval = settings.get("val_check_interval")  # may be a text or a duration too
    if isinstance(interval, float):
        Range(above=0, most=1).check("trainer.val_check_interval", interval)
    elif isinstance(interval, int):
        COUNT.check("trainer.val_check_interval", interval)
