"""What all tasks share: model, optimizer, evaluation, and what a checkpoint carries.

A task adds a model, `count_targets`, `loss_sum` and its evaluation.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from leanbert.compression.distillation import soft_loss
from leanbert.data.module import RowData
from leanbert.data.settings import Part
from leanbert.distributed.parallelize import parallelize
from leanbert.distributed.strategy import FullySharded
from leanbert.errors import UserError
from leanbert.memory.step import StepTask, seed_position
from leanbert.messages import say_once
from leanbert.models.base import EncoderModel
from leanbert.models.config import EncoderConfig
from leanbert.models.kernels.loss import IGNORED, cross_entropy_sum
from leanbert.models.stored import ModelMetadata, Stored
from leanbert.optim.build import OptimizerConfig, build_optimizer
from leanbert.optim.in_backward import accumulate_in_backward, update_in_backward
from leanbert.optim.schedule import Schedule, ScheduleConfig, effective_warmup
from leanbert.pretrained.weights import unpack
from leanbert.ranges import SEED
from leanbert.tasks.distillation import Distillation, take_projections
from leanbert.tasks.step import B, SteppedModule, StepState
from leanbert.tasks.teacher_cache import check_cache, keep_outputs
from leanbert.tasks.teachers import DistillationConfig, read_teacher
from leanbert.tasks.techniques import Surroundings, Techniques, apply, refuse

Answer = dict[str, Any]
"""What `predict` writes of one input: JSON."""

SHRINKING = ("num_layers", "num_heads", "intermediate_size")
"""Sizes of the encoder that structured pruning makes smaller."""


class Task(SteppedModule[B]):
    """A model with its training and evaluation; `B` is what its batches are.

    Args:
        encoder: Architecture of the encoder and, but for the number of blocks, of a decoder.
        optimizer: Optimizer and its settings.
        schedule: Learning rate by step.
        init_from: Hugging Face folder or LeanBERT checkpoint whose weights and architecture to start from; of a model
            of another task they are its encoder's. Other sizes of `encoder` are not used.
        compile: Compile each block with torch.compile: faster steps after about a minute of compilation.
        distillation: What is learnt of a teacher.
        seed: Seed of initial weights and dropout (the CLI sets it to seed_everything if it is 0).

    """

    name: ClassVar[str]
    example: ClassVar[str] = "A text."
    """A line that `predict` answers."""

    def __init__(
        self,
        encoder: EncoderConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        schedule: ScheduleConfig | None = None,
        init_from: str | None = None,
        compile: bool = False,
        seed: int = 0,
        distillation: DistillationConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoder_config = encoder or EncoderConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.schedule_config = schedule or ScheduleConfig()
        self.init_from = init_from
        self.distillation_config = distillation or DistillationConfig()
        self.teacher_source = self.distillation_config.source(init_from)
        self.distillation: Distillation | None = None
        self.projections = nn.ModuleList()  # of the distillation
        self.trains = False
        self.compile_blocks = compile
        SEED.check("model.seed", seed)
        self.seed = seed
        self.model = None  # type: ignore[assignment]  # until configure_model has run
        self.ready_model: Any = None  # is evaluated, and answers, in place of one that is built; it cannot be trained
        self.techniques = Techniques()  # callbacks register here in `setup`
        self.step_state = StepState()
        self.resumes = False  # the weights come from a checkpoint of the same run, and are pruned if it was

    # ---- what a task supplies

    def build_model(self) -> EncoderModel:
        """Return the model for the attached data."""
        raise NotImplementedError

    def build_teacher(self, source: str) -> EncoderModel:
        """Return the model that is learnt from."""
        return read_teacher(source, self._data, self._data.metadata(self.name))

    def build_metrics(self) -> None:
        """Make the metrics of evaluation, which live on the task."""

    def model_inputs(self, batch: B) -> tuple[Any, ...]:
        """Return what the model takes of a batch: what its stacks of blocks read, and where there are targets."""
        raise NotImplementedError

    def forward(self, batch: B) -> Tensor:
        """Return scores [B, M, L] at the targets."""
        return self.model(*self.model_inputs(batch))

    def criterion(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of scores [B, M, L] at `targets`, summed, shape []."""
        return cross_entropy_sum(scores, targets)

    def soft_criterion(self, scores: Tensor, teacher_scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence from a teacher's scores [B, M, L], summed over targets [B, M], shape []."""
        return (soft_loss(scores, teacher_scores, temperature) * (targets != IGNORED)).sum()

    def samples(self, batch: B) -> dict[str, str]:
        """Return Markdown by TensorBoard tag: what the model makes of a few rows of a validation batch."""
        return {}

    def closing_words(self, metrics: dict[str, float]) -> str:
        """Return one line that says what a run came to; `metrics` by tag."""
        return ", ".join(
            f"{tag} {value:.4g}" for tag, value in metrics.items() if tag.startswith("val/") and tag.count("/") == 1
        )

    # ---- weights and optimizer

    def setup(self, stage: str) -> None:
        """Know whether the model is trained."""
        self.trains = stage == "fit"

    @property
    def objective(self) -> StepTask[B]:
        """What is minimised: the task's own loss, or the student's."""
        return self.distillation or self

    @property
    def trained(self) -> nn.Module:
        """What the optimizer updates: the model, and in distillation its projections."""
        return nn.ModuleList((self.model, self.projections)) if self.projections else self.model

    def configure_model(self) -> None:
        """Build the weights once."""
        if self.model is None:
            strategy = self.trainer.strategy
            self.build(self.surroundings(), strategy.mesh if isinstance(strategy, FullySharded) else None)

    def build(self, around: Surroundings, mesh: DeviceMesh | None = None, *, fill: bool = True) -> None:
        """Build the weights from the seed alone, and apply the techniques; see `parallelize` for `mesh` and `fill`.

        Raises:
            UserError: Techniques that cannot combine, with each other or with what is around them.

        """
        refuse(self.techniques, around)
        seed_position(self.seed)
        self.build_metrics()
        sharing: dict[str, Any] = {"dtype": torch.bfloat16 if around.precision == "bf16-mixed" else None}
        sharing |= {"offload": around.offloads, "fill": fill}
        self.offloads = around.offloads
        self.model = self.ready_model or parallelize(self.build_model, self._prepare, mesh, **sharing)
        if self.trains and self.teacher_source is not None:
            if self.distillation_config.cache:
                check_cache(self._data, shards=around.shards)
            self.distillation = Distillation.build(self.distillation_config, self.teacher_source, self, mesh, **sharing)
            self.projections = self.distillation.projections
        # alike on all ranks: to exchange them in each forward pass would leave a rank waiting that has one more
        buffers = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, buffers)

    def _prepare(self, model: EncoderModel) -> None:
        model.config.check_length(self._data.hparams["max_length"])
        techniques = replace(self.techniques, structured=None) if self.resumes else self.techniques
        apply(techniques, model, compile_blocks=self.compile_blocks)

    def on_fit_start(self) -> None:
        """Let the teacher run now, once, where its outputs are kept."""
        if self.distillation is not None and self.distillation_config.cache:
            keep_outputs(self)

    def surroundings(self) -> Surroundings:
        """Return what the techniques run in."""
        trainer = self.trainer
        return Surroundings(
            optimizer=self.optimizer_config.name,
            precision=str(trainer.precision),
            device_type=trainer.strategy.root_device.type,
            world_size=trainer.world_size,
            shards=isinstance(trainer.strategy, FullySharded),
            offloads=isinstance(trainer.strategy, FullySharded) and trainer.strategy.offload,
            clips=bool(trainer.gradient_clip_val),
            compiles=self.compile_blocks,
        )

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and a schedule by steps."""
        in_backward, state = self.techniques.in_backward, self.step_state
        optimizer = build_optimizer(
            self.trained, self.optimizer_config, seed=self.seed, sliced=in_backward == "accumulate"
        )
        if in_backward == "update":
            update_in_backward(self.trained, optimizer, state.check.guard)
        elif in_backward == "accumulate":
            accumulate_in_backward(self.trained, optimizer, lambda: state.position, state.check.guard)
        total_steps = int(self.trainer.estimated_stepping_batches)
        wanted, warmup = self.schedule_config.warmup_steps, effective_warmup(self.schedule_config, total_steps)
        if warmup != wanted:
            say_once(f"warm-up     {warmup} steps; schedule.warmup_steps {wanted} does not fit into {total_steps}")
        schedule = Schedule(optimizer, self.schedule_config, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- evaluation

    def metrics_of(self, part: Part) -> dict[str, float]:
        """Return the metrics by name after all batches of "val" or "test", the same on all ranks, and start afresh."""
        raise NotImplementedError

    def check_monitor(self, tag: str, data: RowData) -> None:
        """Raise UserError if the metric `tag` is known not to be logged of such data."""

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_evaluation("val", self.metrics_of("val"))

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self.log_evaluation("test", self.metrics_of("test"))

    def log_evaluation(self, part: Part, values: dict[str, float]) -> None:
        """Log metrics as `part/name` at the number of completed steps; all ranks have the same."""
        tagged = {f"{part}/{name}": value for name, value in values.items()}
        self.log_dict(tagged, logger=False)
        self.log(f"{part}_loss", values["loss"], prog_bar=True, logger=False)
        if self.logger is not None and not self.trainer.sanity_checking:
            self.logger.log_metrics(tagged, step=self.global_step)

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
        checkpoint["state_dict"] = take_projections(self, checkpoint["state_dict"])
        self._data.samples_consumed = checkpoint["leanbert"]["samples_consumed"]

    def check_resumable(self, stored: Stored, *, shrinks: bool = False) -> None:
        """Raise UserError if `stored` is of another task or architecture.

        Dropout may differ, and the vocabulary is the checkpoint's. Where the run `shrinks` the model, the checkpoint
        may have fewer heads and neurons.
        """
        if (task := stored.metadata.task) != self.name:
            raise UserError(f"--ckpt_path: a checkpoint of task {task}, not {self.name}. Use its config.")
        for setting, value in asdict(self.encoder_config.resolved()).items():
            there = getattr(stored.config, setting)
            smaller = shrinks and setting in SHRINKING and there < value
            if there != value and "dropout" not in setting and setting != "vocab_size" and not smaller:
                raise UserError(
                    f"model.encoder.{setting}: is {value}, but the checkpoint has {there}. "
                    "Give the same size and data settings, or start from it with --model.init_from."
                )

    def resume_from(self, stored: Stored, *, shrinks: bool) -> None:
        """Check `stored` and take over what it decides: the vocabulary, and the sizes that pruning has left."""
        self.check_resumable(stored, shrinks=shrinks)
        names = ("vocab_size", *(("head_size", *SHRINKING) if shrinks else ()))
        self.encoder_config = replace(self.encoder_config, **{name: getattr(stored.config, name) for name in names})
