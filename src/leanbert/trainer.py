"""Lightning's Trainer, with what a run needs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from leanbert.callbacks.loop.agreement import SameOnAllRanks
from leanbert.callbacks.loop.bad_steps import StopOnBadSteps
from leanbert.distributed.strategy import FullySharded
from leanbert.errors import UserError
from leanbert.launcher import Launcher
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


FOUND_LATE = ("`val_check_interval`", "conditioned on metric", "in Lightning, but the")
"""What Lightning finds only in `fit`: a too long interval, EarlyStopping of what is not logged, other devices."""


def _bad_setting(error: Exception) -> UserError:
    """Return what Lightning says of its settings as bad input."""
    return UserError(f"trainer: {str(error).strip().rstrip('.!')}. Correct the setting.")


class _Loop(_FitLoop):
    """Lightning's loop, which starts and ends also where no step is left: what a kill has prevented is made up then."""

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0 or self.max_batches == 0


class _Signals(_SignalConnector):
    """None of Lightning's signals, but ours: it would save in the middle of a step, each rank in another."""

    def register_signal_handlers(self) -> None:
        """Leave SIGTERM to `leanbert.signals`, and SIGUSR1, by which Lightning requeues jobs of SLURM, alone."""


class Trainer(pl.Trainer):
    """Lightning's Trainer, which stops on losses that are not numbers, and whose `log_dir` is the run's folder.

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
        stop = StopOnBadSteps(max_bad_steps)
        if (strategy := settings.get("strategy")) in ("fsdp", "hsdp"):  # Lightning's `fsdp` is torch's older one
            settings["strategy"] = FullySharded("nodes" if strategy == "hsdp" else 1)
        try:
            super().__init__(callbacks=[*given, stop], **settings)
        except (TypeError, ValueError, ImportError, RuntimeError, MisconfigurationException) as error:
            raise _bad_setting(error) from error
        if type(launcher := self.strategy.launcher) is _SubprocessScriptLauncher:
            self.strategy._launcher = Launcher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        loop, self.fit_loop = self.fit_loop, _Loop(self, self.fit_loop.min_epochs, self.fit_loop.max_epochs)
        self.fit_loop.epoch_loop = loop.epoch_loop
        self._signal_connector = _Signals(self)

    def fit(self, *arguments: Any, **settings: Any) -> None:
        """Train. Raises UserError too for what Lightning finds wrong with its settings only now."""
        try:
            super().fit(*arguments, **settings)
        except (ValueError, RuntimeError) as error:
            if not any(sign in str(error) for sign in FOUND_LATE):
                raise
            raise _bad_setting(error) from error

    def _run(self, *arguments: Any, **settings: Any) -> Any:
        """Run what ranks do together, having compared their settings.

        The process group starts earlier for that: what a strategy exchanges first, another one would wait for in vain.
        """
        strategy: Any = self.strategy
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        compared = [each for each in callbacks if isinstance(each, SameOnAllRanks)]
        if compared and self.world_size > 1:
            strategy.accelerator.setup_device(strategy.root_device)
            (strategy.setup_distributed if isinstance(strategy, DDPStrategy) else strategy._setup_distributed)()
            compared[0].compare_settings()
        return super()._run(*arguments, **settings)

    @property
    def log_dir(self) -> str | None:
        """The run's folder, on every rank that of the first, whatever the loggers are. All ranks ask together."""
        folder = self.strategy.broadcast(self.run_folder) if self.state.fn == "fit" else None
        return super().log_dir if folder is None else str(folder)


def _check_ranges(settings: dict[str, Any]) -> None:
    """Raise UserError for a number that makes no sense: Lightning would take it, or not say what to give instead."""
    for name, allowed in RANGES.items():
        allowed.check(f"trainer.{name}", settings.get(name))
    for name in ("max_steps", "max_epochs"):
        if settings.get(name) != NO_LIMIT:
            COUNT.check(f"trainer.{name}", settings.get(name))
    for name in LIMITS:
        value = settings.get(name)
        (SHARE if isinstance(value, float) else WHOLE).check(f"trainer.{name}", value)
    if (devices := settings.get("devices")) in ([], 0, "0"):
        raise UserError(
            f"trainer.devices: {devices} leaves none to train on. Give 1 or more, or auto; to leave GPUs alone set "
            "trainer.accelerator to cpu."
        )
    if settings.get("overfit_batches"):
        raise UserError(
            "trainer.overfit_batches: is not supported. Give a small file as data.train_files and data.val_files."
        )
    interval = settings.get("val_check_interval")  # may be a text or a duration too
    if isinstance(interval, float):
        Range(above=0, most=1).check("trainer.val_check_interval", interval)
    elif isinstance(interval, int):
        COUNT.check("trainer.val_check_interval", interval)
