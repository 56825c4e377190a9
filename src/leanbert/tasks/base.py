"""What all tasks share: the step, the optimizer and what a checkpoint carries.

A task adds a model, `count_targets`, `loss_sum` and its evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leanbert.errors import UserError
from leanbert.memory.finite import StepCheck
from leanbert.memory.recovery import agree, retry_smaller
from leanbert.memory.step import backpropagate_all_but_last, seed_position
from leanbert.models.config import EncoderConfig
from leanbert.models.stored import ModelMetadata, Stored
from leanbert.optim.build import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    effective_warmup,
    learning_rate_factor,
    trainable,
)
from leanbert.optim.in_backward import accumulate_in_backward, update_in_backward
from leanbert.pretrained.weights import unpack
from leanbert.ranges import SEED
from leanbert.tasks.techniques import Surroundings, Techniques, apply, refuse

SHRINKING = ("num_heads", "intermediate_size")
"""Sizes of the encoder that structured pruning makes smaller."""


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
        SEED.check("model.seed", seed)
        self.seed = seed
        self.model = None
        self.techniques = Techniques()  # callbacks register here in `setup`
        self.shrinks = False  # heads and neurons may be removed in this run
        self.resumes = False  # the weights come from a checkpoint of the same run, pruned if it was
        self.wanted_micro_batch: int | None = None  # sequences of one forward pass on each device; None: all
        self.largest_micro_batch: int | None = None  # what fits, once memory has run out
        self.planned_device: str | None = None  # the device that a plan is made for, if it is another one
        self.planned_world_size: int | None = None
        self.planned_sharding = False
        self.step_check = StepCheck()
        self.shrink: Callable[[BaseException], bool] = lambda error: False
        self._peak_rates: list[float] = []
        self._place = (0, 1)  # index of the current micro-batch, micro-batches of the step
        self._rows = 0

    # ---- what a task supplies

    def build_model(self) -> nn.Module:
        """Return the model for the attached data."""
        raise NotImplementedError

    def build_metrics(self) -> None:
        """Make the metrics of evaluation, which live on the task."""

    def count_targets(self, batch: Any) -> Tensor:
        """Return the number of targets, shape []."""
        raise NotImplementedError

    def loss_sum(self, batch: Any) -> Tensor:
        """Return the loss summed over targets, shape []."""
        raise NotImplementedError

    def samples(self, batch: Any) -> dict[str, str]:
        """Return Markdown by TensorBoard tag: what the model makes of a few rows of a validation batch."""
        return {}

    def closing_words(self, metrics: dict[str, float]) -> str:
        """Return one line that says what a run came to; `metrics` by tag."""
        return ", ".join(
            f"{tag} {value:.4g}" for tag, value in metrics.items() if tag.startswith("val/") and tag.count("/") == 1
        )

    example: ClassVar[str] = "A text."
    """A line that `predict` answers."""

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def micro_batch(self) -> int | None:
        """Sequences of one forward pass on each device: what is wanted, as far as it fits; None: all."""
        bounds = [rows for rows in (self.wanted_micro_batch, self.largest_micro_batch) if rows is not None]
        return min(bounds, default=None)

    # ---- weights

    def configure_model(self) -> None:
        """Build the weights once, from the seed alone, and apply the techniques.

        Raises:
            UserError: Techniques that cannot combine, with each other or with trainer and precision.

        """
        if self.model is None:
            refuse(self.techniques, self._surroundings())
            seed_position(self.seed)
            self.build_metrics()
            self.model = self.build_model()
            self.model.config.check_length(self._data.hparams["max_length"])
            techniques = replace(self.techniques, structured=None) if self.resumes else self.techniques
            apply(techniques, self.model, compile_blocks=self.compile_blocks)
            # alike on all ranks: to exchange them in each forward pass would leave a rank waiting that has one more
            buffers = [name for name, _ in self.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, buffers)

    @property
    def shards(self) -> bool:
        """Whether the strategy, or that which is planned for, shards the weights."""
        return self.planned_sharding or isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy)

    def _surroundings(self) -> Surroundings:
        trainer = self.trainer
        return Surroundings(
            optimizer=self.optimizer_config.name,
            precision=str(trainer.precision),
            device_type=self.planned_device or trainer.strategy.root_device.type,
            world_size=self.planned_world_size or trainer.world_size,
            shards=self.shards,
            clips=bool(trainer.gradient_clip_val),
            compiles=self.compile_blocks,
        )

    # ---- the step

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Run a step up to the last backward pass, which Lightning does."""
        strategy: Any = self.trainer.strategy
        world_size = self.trainer.world_size
        parallel = isinstance(strategy, ParallelStrategy) and world_size > 1
        sum_over_ranks = self._sum_over_ranks if parallel else None

        def attempt() -> tuple[Tensor, Tensor]:
            self.step_check.reset()
            return backpropagate_all_but_last(
                self,
                batch,
                micro_batch=self.micro_batch,
                world_size=world_size,
                sum_over_ranks=sum_over_ranks,
                backward=lambda part: strategy.backward(part, None),
                no_sync=strategy.block_backward_sync if parallel else nullcontext,
                seed_micro_batch=self._start_micro_batch,
            )

        self._rows = len(batch)
        if parallel and self.techniques.recovery:  # all ranks agree before the pass that exchanges gradients
            last, loss = retry_smaller(lambda: agree(attempt, self._any_rank), self._undo_and_shrink)
        else:
            last, loss = attempt()
        loss = self.step_check.loss = self._sum_over_ranks(loss) if parallel else loss
        return {"loss": last, "step_loss": loss, "learning_rate": self._learning_rate()}

    def _start_micro_batch(self, index: int) -> None:
        self._place = (index, -(-self._rows // (self.micro_batch or self._rows)))
        seed_position(self.seed, self.global_step, self.global_rank, index)

    def _any_rank(self, failed: bool) -> bool:
        return bool(self._sum_over_ranks(torch.tensor(float(failed), device=self.device)) > 0)

    def _undo_and_shrink(self, error: BaseException) -> bool:
        self.zero_grad(set_to_none=True)
        return self.shrink(error)

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
        """Update, then free the gradients: the next forward pass has no use for them.

        There is no update where loss or gradients are not finite. When memory runs out and recovery is on, the whole
        closure (forward and backward passes) is run again.
        """
        closure = optimizer_closure
        if closure is not None and self.techniques.recovery and self.trainer.world_size == 1:
            closure = partial(retry_smaller, closure, self._undo_and_shrink)
        if closure is not None:
            closure = partial(self._checked, closure)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        optimizer.zero_grad(set_to_none=True)
        self._data.samples_consumed += self._rows * self.trainer.world_size

    def _checked(self, closure: Callable[[], Any]) -> Any:
        """Run the passes of a step, and look at what they have left."""
        result = closure()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        parameters = trainable(self.model.parameters())
        if scaler is None:
            self.step_check.guard(parameters)
        elif scaler.get_scale() <= 1.0:  # above, gradients overflow while the scale is found, and the scaler leaves out
            self.step_check.look(parameters)
        return result

    def configure_optimizers(self) -> Any:
        """Return the optimizer and a schedule by steps."""
        in_backward = self.techniques.in_backward
        optimizer = build_optimizer(
            self.model, self.optimizer_config, seed=self.seed, sliced=in_backward == "accumulate"
        )
        if in_backward == "update":
            update_in_backward(self.model, optimizer, self.step_check.guard)
        elif in_backward == "accumulate":
            accumulate_in_backward(self.model, optimizer, lambda: self._place, self.step_check.guard)
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

    # ---- evaluation

    def log_evaluation(self, part: str, values: dict[str, float]) -> None:
        """Log metrics as `part/name` at the number of completed steps; all ranks have the same."""
        tagged = {f"{part}/{name}": value for name, value in values.items()}
        self.log_dict(tagged, logger=False)
        self.log(f"{part}_loss", values["loss"], prog_bar=True, logger=False)
        if self.logger is not None and not self.trainer.sanity_checking:
            self.logger.log_metrics(tagged, step=self.global_step)

    def gather_over_ranks(self, items: list[Any]) -> list[Any]:
        """Return the items of all ranks, of which each rank may have another number, or none."""
        if self.trainer.world_size == 1:
            return items
        parts: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes the file whole by itself: architecture, tokenizers, position in the data."""
        of_data = self._data.metadata(self.name).said()
        checkpoint["leanbert"] = {
            "task": self.name,
            "encoder": asdict(self.model.config),
            **{name: tokenizer.to_json() for name, tokenizer in self._data.tokenizers.items()},
            "max_length": self._data.hparams["max_length"],
            "samples_consumed": self._data.samples_consumed,
            "data": of_data,
            "model": {name: value for name, value in self.metadata().said().items() if name not in of_data},
        }

    def metadata(self) -> ModelMetadata:
        """Return what a checkpoint keeps of data and model besides tokenizers and encoder."""
        return self._data.metadata(self.name)

    def adopt(self, metadata: ModelMetadata) -> None:
        """Take over what a stored model says of its weights; how to answer is as this run sets it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the architectures agree and go on at the stored position of the data.

        Raises:
            UserError: The checkpoint is of another task or shape.

        """
        self.check_resumable(unpack(checkpoint, Path("--ckpt_path")))
        self._data.samples_consumed = checkpoint["leanbert"]["samples_consumed"]

    def check_resumable(self, stored: Stored) -> None:
        """Raise UserError if `stored` is of another task or architecture.

        Dropout may differ, and the vocabulary is the checkpoint's; so are the sizes of heads and neurons that pruning
        removes.
        """
        if (task := stored.metadata.task) != self.name:
            raise UserError(f"--ckpt_path: a checkpoint of task {task}, not {self.name}. Use its config.")
        for setting, value in asdict(self.encoder_config.resolved()).items():
            there = getattr(stored.config, setting)
            smaller = self.shrinks and setting in SHRINKING and there < value
            if there != value and "dropout" not in setting and setting != "vocab_size" and not smaller:
                raise UserError(
                    f"model.encoder.{setting}: is {value}, but the checkpoint has {there}. "
                    "Give the same size and data settings, or start from it with --model.init_from."
                )

    def resume_from(self, stored: Stored) -> None:
        """Check `stored` and take over what it decides: the vocabulary, and the sizes that pruning has left."""
        self.check_resumable(stored)
        names = ("vocab_size", *(("head_size", *SHRINKING) if self.shrinks else ()))
        self.encoder_config = replace(self.encoder_config, **{name: getattr(stored.config, name) for name in names})
        self.resumes = True
