"""Gradient accumulation and recovery from running out of memory."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from leanbert.callbacks.techniques.base import TechniqueCallback
from leanbert.callbacks.values import log_values, rows_per_device, task_of
from leanbert.errors import UserError
from leanbert.messages import say
from leanbert.ranges import COUNT, WHOLE
from leanbert.tasks.step import StepState
from leanbert.tasks.techniques import Techniques


class GradientAccumulation(TechniqueCallback):
    """Cut the batch of each step into micro-batches; training is the same (exact), with the memory of a micro-batch.

    Args:
        micro_batch: Sequences of one forward pass on each device; or `{0: 4, 1000: 16}`, from a step or epoch on.
        by: What the keys of such a schedule count.

    Raises:
        UserError: A micro-batch is less than 1, or none is smaller than a device's batch.

    """

    def __init__(self, micro_batch: int | dict[int, int] = 8, by: Literal["step", "epoch"] = "step") -> None:
        self.schedule = micro_batch if isinstance(micro_batch, dict) else {0: micro_batch}
        self.by = by
        for start, rows in self.schedule.items():
            WHOLE.check("GradientAccumulation.micro_batch", start)
            COUNT.check("GradientAccumulation.micro_batch", rows)
        if 0 not in self.schedule:
            raise UserError("GradientAccumulation.micro_batch: does not say how to begin. Give a value for 0.")

    def register(self, techniques: Techniques) -> None:
        """Ask for micro-batches."""
        techniques.micro_batch = max(self.schedule.values())

    def reach_peak(self) -> None:
        """Keep the largest micro-batch."""
        self.schedule = {0: max(self.schedule.values())}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register, unless nothing would be cut."""
        super().setup(trainer, pl_module, stage)
        rows = rows_per_device(trainer)
        if stage == "fit" and min(self.schedule.values()) >= rows:
            raise UserError(
                f"GradientAccumulation.micro_batch: {min(self.schedule.values())} does not cut a device's batch of "
                f"{rows} sequences. Give less than {rows}, or leave it out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the micro-batch also where no step is left: the summary tells it."""
        step, most = trainer.global_step, trainer.max_steps
        self._set(trainer, task_of(pl_module).step_state, most - 1 if step == most else step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Set the micro-batch, a function of the step (or epoch) alone, so a resumed run has it from the start."""
        self._set(trainer, task_of(pl_module).step_state, trainer.global_step)

    def _set(self, trainer: Trainer, state: StepState, step: int) -> None:
        now = step if self.by == "step" else trainer.current_epoch
        wanted = self.schedule[max(start for start in self.schedule if start <= now)]
        if wanted != state.wanted_micro_batch:
            state.wanted_micro_batch = wanted
            log_micro_batch(trainer, state)


class OutOfMemoryRecovery(TechniqueCallback):
    """Replay a step with half the micro-batch when memory runs out; loss and effective batch stay the same (exact).

    The smaller micro-batch is kept, also in a resumed run. It catches what the device's allocator raises: on Linux
    the system kills a process that uses up the host's memory without asking it.

    Args:
        smallest: Micro-batch below which the run fails with the error.

    """

    def __init__(self, smallest: int = 1) -> None:
        COUNT.check("OutOfMemoryRecovery.smallest", smallest)
        self.smallest = smallest
        self.events = 0
        self.largest: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the micro-batch that fits."""
        return {"largest": self.largest, "events": self.events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep to the micro-batch that fits."""
        self.largest, self.events = state_dict["largest"], state_dict["events"]

    def register(self, techniques: Techniques) -> None:
        """Ask for steps to be replayed."""
        techniques.recovery = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Register, and tell the task how to go on."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            state = task_of(pl_module).step_state
            state.shrink = lambda error: self._shrink(trainer, state, error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the micro-batch that fitted."""
        task_of(pl_module).step_state.largest_micro_batch = self.largest

    def _shrink(self, trainer: Trainer, state: StepState, error: BaseException) -> bool:
        rows = state.micro_batch or rows_per_device(trainer)
        if rows <= self.smallest:
            return False
        self.largest = state.largest_micro_batch = max(self.smallest, rows // 2)
        self.events += 1
        say(
            f"Out of memory in step {trainer.global_step + 1}: replayed with a micro-batch of {self.largest} instead "
            f"of {rows} sequences, which is kept ({' '.join(str(error).split())[:120]})"
        )
        log_micro_batch(trainer, state)
        log_values(trainer, {"accumulation/out_of_memory_events": float(self.events)})
        return True


def log_micro_batch(trainer: Trainer, state: StepState) -> None:
    """Log the micro-batch at the number of completed steps."""
    log_values(trainer, {"accumulation/micro_batch_sequences": float(state.micro_batch or rows_per_device(trainer))})
