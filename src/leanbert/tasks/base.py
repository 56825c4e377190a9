"""What all tasks share: the step, the optimizer and what a checkpoint carries.

A task adds a model, `count_targets`, `loss_sum` and its evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from leanbert.errors import UserError
from leanbert.memory.optimizers import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    effective_warmup,
    learning_rate_factor,
)
from leanbert.memory.step import backpropagate_all_but_last, seed_position
from leanbert.models.config import EncoderConfig


class Task(LightningModule):
    """A LightningModule whose optimizer steps are those of `leanbert.memory.step`.

    Args:
        encoder: Architecture of the encoder.
        optimizer: Optimizer and its settings.
        schedule: Learning rate by step.
        init_from: Hugging Face folder or LeanBERT checkpoint whose weights and architecture to start from.
        compile: Compile each block with torch.compile: faster steps after about a minute of compilation.
        seed: Seed of initial weights and dropout (the CLI sets it to seed_everything if it is 0).

    """

    name: ClassVar[str]
    model: Any  # an nn.Module once configure_model has run

    def __init__(
        self,
        encoder: EncoderConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder_config = encoder or EncoderConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule_config = schedule or ScheduleConfig()
        self.init_from = init_from
        self.compile_blocks = compile
        self.seed = seed
        self.model = None
        self._peak_rates: list[float] = []
        self.micro_batch: int | None = None  # sequences of one forward pass on each device; None: all

    # ---- what a task supplies

    def build_model(self) -> nn.Module:
        """Return the model for the attached data."""
        raise NotImplementedError

    def count_targets(self, batch: Any) -> Tensor:
        """Return the number of targets, shape []."""
        raise NotImplementedError

    def loss_sum(self, batch: Any) -> Tensor:
        """Return the loss summed over targets, shape []."""
        raise NotImplementedError

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    # ---- weights

    def configure_model(self) -> None:
        """Build the weights once, from the seed alone."""
        if self.model is None:
            seed_position(self.seed)
            self.model = self.build_model()
            self.model.config.check_length(self._data.hparams["max_length"])

    # ---- the step

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Run a step up to the last backward pass, which Lightning does."""
        strategy: Any = self.trainer.strategy
        world_size = self.trainer.world_size
        parallel = isinstance(strategy, ParallelStrategy) and world_size > 1
        last, loss = backpropagate_all_but_last(
            self,
            batch,
            micro_batch=self.micro_batch,
            world_size=world_size,
            sum_over_ranks=self._sum_over_ranks if parallel else None,
            backward=lambda part: strategy.backward(part, None),
            no_sync=strategy.block_backward_sync if parallel else nullcontext,
            seed_micro_batch=lambda index: seed_position(self.seed, self.global_step, self.global_rank, index),
        )
        self._data.samples_consumed += len(batch) * world_size
        loss = self._sum_over_ranks(loss) if parallel else loss
        return {"loss": last, "step_loss": loss, "learning_rate": self._learning_rate()}

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value.clone(), reduce_op="sum")

    def _learning_rate(self) -> float:
        """Return the rate of this step: the last group is AdamW's where Muon has its own."""
        return float(self.trainer.optimizers[0].param_groups[-1]["lr"])

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: Lightning calls this between forward and backward, where micro-batches have left gradients."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update, then free the gradients: the next forward pass has no use for them."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a schedule by steps."""
        optimizer = build_optimizer(self.model, self.optimizer_config)
        self._peak_rates = [group["lr"] for group in optimizer.param_groups]
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup = effective_warmup(self.schedule_config, total_steps)
        if warmup != self.schedule_config.warmup_steps:
            rank_zero_warn(
                f"Warm-up of {self.schedule_config.warmup_steps} steps does not fit into {total_steps}: {warmup} used."
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(self.schedule_config, step, total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the rates of this run's settings and length: a checkpoint brings those of the run that wrote it."""
        scheduler: Any = self.lr_schedulers()
        total_steps = int(self.trainer.estimated_stepping_batches)
        factor = learning_rate_factor(self.schedule_config, self.global_step, total_steps)
        scheduler.base_lrs = list(self._peak_rates)
        for group, peak in zip(self.trainer.optimizers[0].param_groups, self._peak_rates, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * factor

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the file whole by itself: architecture, tokenizer, position in the data."""
        checkpoint["leanbert"] = {
            "task": self.name,
            "encoder": asdict(self.model.config),
            "tokenizer": self._data.tokenizer.to_json(),
            "max_length": self._data.hparams["max_length"],
            "samples_consumed": self._data.samples_consumed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the architectures agree and go on at the stored position of the data.

        Raises:
            UserError: The checkpoint is of another task or shape.

        """
        stored = checkpoint["leanbert"]
        self.check_resumable(stored)
        self._data.samples_consumed = stored["samples_consumed"]

    def check_resumable(self, stored: dict[str, Any]) -> None:
        """Raise UserError if `stored`, a checkpoint's "leanbert" part, is of another task or architecture.

        Dropout may differ, and the vocabulary is the checkpoint's.
        """
        if stored["task"] != self.name:
            raise UserError(f"--ckpt_path: a checkpoint of task {stored['task']}, not {self.name}. Use its config.")
        for setting, value in asdict(self.encoder_config.resolved()).items():
            there = stored["encoder"].get(setting)
            if there != value and "dropout" not in setting and setting != "vocab_size":
                raise UserError(
                    f"model.encoder.{setting}: is {value}, but the checkpoint has {there}. "
                    "Give the same size and data settings, or start from it with --model.init_from."
                )
