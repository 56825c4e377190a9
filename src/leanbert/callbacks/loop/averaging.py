"""The mean of the weights that a run had at its last, or best, validations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from leanbert import checkpoints
from leanbert.callbacks.loop.validation import run_validation
from leanbert.callbacks.techniques.pruning import WeightPruning
from leanbert.callbacks.techniques.structured import StructuredPruning
from leanbert.callbacks.values import callbacks_of
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.units import MIB


class KeptWeights:
    """Files with the weights of the `count` last, or best, validations after step 0, and their mean at the end.

    They lie in `<checkpoints>/weights/`, and only those that are kept: a resumed run deletes what another course of it
    has left there.

    Args:
        count: Validations whose weights are kept.
        monitor: Metric that tells which are the best, the earlier of equal ones first; None: the last are kept.
        sign: 1 where the smallest value is the best, -1 where the largest is.

    """

    def __init__(self, count: int, monitor: str | None, sign: float = 1.0) -> None:
        self.count, self.monitor, self.sign = count, monitor, sign
        self.setting = "checkpoint.average_last" if monitor is None else "checkpoint.average_best"
        self.kept: list[tuple[int, float]] = []  # steps and values of the metric, by step

    def state_dict(self) -> dict[str, Any]:
        """Return which validations are kept, and by what rule."""
        return {"rule": self._rule, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the validations kept before, unless another rule chose them."""
        if state["rule"] == self._rule:
            self.kept = [(step, value) for step, value in state["kept"]]

    @property
    def _rule(self) -> list[Any]:
        return [self.monitor, self.sign]

    def check(self, trainer: Trainer) -> None:
        """Raise UserError for a run whose weights have no mean, or that never validates."""
        problem = None
        if trainer.limit_val_batches == 0:
            problem = "trainer.limit_val_batches is 0, and weights are kept at validations. Give more"
        for pruning in callbacks_of(trainer, WeightPruning):
            problem = f"{type(pruning).__name__} moves the zeros, of which a mean has fewer. Leave one of the two out"
        if any(pruning.at_step > 0 for pruning in callbacks_of(trainer, StructuredPruning)):
            problem = "StructuredPruning.at_step makes the model smaller on the way. Give at_step 0"
        if problem:
            raise UserError(f"{self.setting}: is {self.count}, but {problem}.")

    def find(self, trainer: Trainer, folder: Path) -> None:
        """Forget validations whose file is gone: dropped after the checkpoint was written, or of another run."""
        there = [(step, value) for step, value in self.kept if _file(folder, step).is_file()]
        self.kept = trainer.strategy.broadcast(there)

    def announce(self, module: LightningModule) -> None:
        """Say what is kept and what room it takes."""
        size = sum(weight.numel() * weight.element_size() for weight in module.parameters()) / MIB
        say(f"{'average':<11} of {self._name}, {self.count} x {size:,.0f} MiB on disk")

    @property
    def _name(self) -> str:
        return f"the last {self.count} validations" if self.monitor is None else f"the {self.count} best {self.monitor}"

    def keep(self, trainer: Trainer, folder: Path) -> None:
        """Keep the weights of the validation that has just ended if they are among the last, or best."""
        step, value = trainer.global_step, trainer.callback_metrics.get(self.monitor or "")
        if step == 0:
            return
        if self.monitor is not None and (value is None or not math.isfinite(value)):
            return
        others = [(other, known) for other, known in self.kept if other != step]
        candidates = [*others, (step, 0.0 if value is None else float(value))]
        if self.monitor is not None:  # the sort leaves equal ones in their order
            candidates = sorted(sorted(candidates, key=lambda entry: self.sign * entry[1])[: self.count])
        self.kept = candidates[-self.count :]
        if self.kept[-1][0] == step:
            trainer.save_checkpoint(_file(folder, step), weights_only=True)
        if trainer.is_global_zero:
            self.clear(folder)

    def clear(self, folder: Path) -> None:
        """Delete the files that are not kept."""
        kept = {_file(folder, step) for step, _ in self.kept}
        for path in {*folder.glob("weights/step-*.ckpt")} - kept:
            path.unlink()

    def write_mean(self, trainer: Trainer, folder: Path) -> Path | None:
        """Write the mean to `average.ckpt` and return its path; with fewer than two whole files say so instead."""
        steps: list[int] = []
        if trainer.is_global_zero:
            steps = [step for step, _ in self.kept if checkpoints.is_whole(_file(folder, step))]
            if len(steps) > 1:
                mean = checkpoints.mean([_file(folder, step) for step in steps])
                checkpoints.save(mean, folder / checkpoints.AVERAGE)
        steps = trainer.strategy.broadcast(steps)
        if len(steps) > 1:
            say(f"average of the weights after steps {', '.join(map(str, steps))}")
            return folder / checkpoints.AVERAGE
        say(f"no average of {len(steps)}: it takes the weights of two validations. Lower trainer.val_check_interval.")
        return None


def _file(folder: Path, step: int) -> Path:
    return folder / "weights" / checkpoints.step_name(step)


def validate_with(trainer: Trainer, module: LightningModule, path: Path) -> dict[str, float]:
    """Return the metrics of validation with the weights at `path`; loggers and callbacks do not see it.

    The module has its own weights again afterwards.
    """
    own = {name: _copy(tensor) for name, tensor in module.state_dict().items()}
    hidden = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    values: list[Any] = [trainer.callback_metrics, trainer.progress_bar_metrics]
    before = [dict(each) for each in values]
    try:
        trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
        trainer.strategy.load_model_state_dict(checkpoints.load(path))
        run_validation(trainer)
        found = {tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith("val/")}
    finally:
        trainer.callbacks, trainer.loggers = hidden  # type: ignore[attr-defined]
        module.load_state_dict(own)
    for each, earlier in zip(values, before, strict=True):
        each.update(earlier)
    return found


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, or of a sharded tensor where it is."""
    return tensor.detach().clone() if isinstance(tensor, DTensor) else tensor.detach().cpu().clone()
