"""Training from a teacher: a trained model of the same task whose outputs and states the student learns.

The teacher is beside the task, not a part of it: it has no gradients, and is in no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from leanbert.compression.distillation import (
    Projection,
    check_teacher,
    mean_hidden_loss,
    recorded_states,
    relation_loss,
)
from leanbert.data.module import RowData
from leanbert.data.pairs import TARGET
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.distributed.parallelize import free_gathered, parallelize
from leanbert.distributed.sharding import shard_unit
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.heads import sum_in_chunks
from leanbert.models.packed_inputs import PackedInputs
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import read_model, rebuild
from leanbert.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, check_ranges

START = "init_from"
"""Names the model that the student starts from as the teacher."""


@dataclass
class DistillationConfig:
    """What a student learns of its teacher."""

    teacher: str | None = None
    """Checkpoint or Hugging Face folder of a trained model of the same task, tokenizer and labels. init_from: the model
    that training starts from, as it is before anything is removed of it. Default: none, and the rest has no effect."""
    logits: float = 0.5
    """Weight of the teacher's distribution in the loss, from 0 to 1; the rest is the task's own loss."""
    temperature: float = 2.0
    """What both distributions are softened by (Hinton et al. 2015, arXiv 1503.02531)."""
    hidden: float = 0.0
    """Weight of the distance of hidden states, which is added: of the embeddings and after each block of the student,
    by a learned projection where the teacher is wider (Jiao et al. 2020, arXiv 1909.10351)."""
    layers: list[int] | None = None
    """Teacher's block, from 1, that each block of the student's encoder is compared with. Default: evenly spaced, as
    in a decoder."""
    relations: float = 0.0
    """Weight of the relations among queries, keys and values of the last blocks, which is added (Wang et al. 2021,
    arXiv 2012.15828)."""
    relation_heads: int = 4
    """Slices of the queries whose relations are compared: a divisor of both models' widths."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the teacher's weights. Default: of the student's."""

    def __post_init__(self) -> None:
        """Raise UserError for a value out of its range, or where nothing of the teacher is learnt."""
        ranges = {
            "logits": SHARE, "temperature": POSITIVE, "hidden": NOT_NEGATIVE, "relations": NOT_NEGATIVE,
            "relation_heads": COUNT,
        }  # fmt: skip
        check_ranges("model.distillation", vars(self), ranges)
        idle = {
            "temperature": self.logits > 0, "layers": self.hidden + self.relations > 0,
            "relation_heads": self.relations > 0,
        }  # fmt: skip
        defaults = {field.name: field.default for field in fields(self)}
        for name, used in idle.items():
            if self.teacher is not None and not used and getattr(self, name) != defaults[name]:
                raise UserError(f"model.distillation.{name}: has no effect without what it belongs to. Leave it out")
        if self.teacher is not None and not (self.logits or self.hidden or self.relations):
            raise UserError(
                "model.distillation.logits: 0, as hidden and relations, so nothing of the teacher is learnt. Give one"
            )

    def source(self, init_from: str | None) -> str | None:
        """Return where the teacher is, `START` if that is the start of training and there is none."""
        return self.teacher if self.teacher != START or init_from is None else init_from


def check_distillation(task: object, teacher: str) -> None:
    """Raise UserError if a task cannot have the teacher that is asked for."""
    if teacher == START:
        raise UserError(
            "model.distillation.teacher: is the model that training starts from, but none is named. "
            "Give --model.init_from, or the path of a teacher"
        )
    own = {name: not getattr(type(task), name).__module__.startswith("leanbert.") for name in ("loss_sum", "criterion")}
    if own["loss_sum"] and not own["criterion"]:
        raise UserError(
            f"model.distillation: {type(task).__name__} has a loss_sum of its own, which a student does not use. "
            "Say in criterion and model_inputs what its loss is"
        )


def read_teacher(source: str, data: RowData, metadata: ModelMetadata) -> EncoderModel:
    """Return the model at `source`.

    Raises `UserError` if it reads other tokens than the data, or answers otherwise than `metadata` say.
    """
    stored = read_model(source)
    for name, default in (("problem", "single"), ("mark", "tokens")):
        own, theirs = (getattr(said, name) or default for said in (metadata, stored.metadata))
        if own != theirs and stored.metadata.task == metadata.task:
            raise UserError(f"data.{name}: is {own}, but the teacher {source} has learnt {theirs}. Give the same")
    for name, tokenizer in data.tokenizers.items():
        if TextTokenizer.from_file(source, name).to_json() != tokenizer.to_json():
            raise UserError(
                f"model.distillation.teacher: {source} has another tokenizer than the data. Leave data.{name} out"
            )
    sizes = {name: tokenizer.vocab_size for name, tokenizer in data.tokenizers.items()}
    return rebuild(stored, sizes["tokenizer"], sizes.get(TARGET))


class Distilled(Protocol):
    """What a task is asked for its student's loss."""

    model: EncoderModel

    def build_teacher(self, source: str) -> EncoderModel:
        """Return the model that is learnt from."""
        ...

    def count_targets(self, batch: Any) -> Tensor:
        """Return the number of targets, shape []."""
        ...

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor of shape [] over all ranks."""
        ...

    def model_inputs(self, batch: Any) -> tuple[Any, ...]:
        """Return what the model takes of a batch."""
        ...

    def criterion(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of scores [B, M, L], summed, shape []."""
        ...

    def soft_criterion(self, scores: Tensor, teacher_scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Return the divergence from the teacher's scores, summed over targets, shape []."""
        ...


class Distillation:
    """A teacher, and the loss of a student that learns from it.

    Args:
        config: The settings.
        teacher: The model; it is not trained.
        task: The task, whose model is.

    Attributes:
        projections: For each stack of blocks the map from the student's width to the teacher's, where hidden states are
            compared and the widths differ; trained with the student, and of no use afterwards.

    Raises:
        UserError: Student and teacher cannot be compared.

    """

    def __init__(self, config: DistillationConfig, teacher: EncoderModel, task: Distilled) -> None:
        self.config, self.task = config, task
        student = task.model
        if student.head_chunk is not None and getattr(student, "pointer", None) is not None:
            raise UserError("ChunkedHead: a student with model.copy makes its scores at once. Leave one of them out")
        check_teacher(student, teacher, config.relation_heads if config.relations else None)
        self.teacher = teacher.eval().requires_grad_(False)
        width, theirs = student.config.hidden_size, teacher.config.hidden_size
        self.projections = nn.ModuleList(
            Projection(width, theirs, bias=False) for _ in student.stacks if config.hidden and width != theirs
        )
        self._layers = [
            self._compared(len(own.blocks), len(known.blocks), config.layers if own is student.encoder else None)
            for own, known in zip(student.stacks, teacher.stacks, strict=True)
        ]
        self._compares_states = config.hidden + config.relations > 0
        self._weights: list[Tensor] = []

    @classmethod
    def build(
        cls, config: DistillationConfig, source: str, task: Distilled, mesh: DeviceMesh | None, *,
        dtype: torch.dtype | None, fill: bool,
    ) -> Distillation:  # fmt: skip
        """Return it with the teacher at `source`, which is sharded as the student is; see `parallelize`.

        Raises:
            UserError: The task cannot have this teacher.

        """
        check_distillation(task, source)

        def make() -> EncoderModel:
            usual = torch.get_default_dtype()
            torch.set_default_dtype(usual if config.dtype is None else getattr(torch, config.dtype))
            try:
                return task.build_teacher(source)
            finally:
                torch.set_default_dtype(usual)

        made = cls(config, parallelize(make, lambda _: None, mesh, dtype=dtype, fill=fill), task)
        if mesh is not None:
            for projection in made.projections:
                shard_unit(projection, mesh, dtype)
        return made

    def _compared(self, own: int, known: int, layers: list[int] | None) -> list[int]:
        """Return the teacher's state that each of the student's is compared with; state 0 is the embeddings'."""
        if layers is None:
            return [round(layer * known / own) for layer in range(own + 1)]
        if len(layers) != own or not all(1 <= layer <= known for layer in layers):
            raise UserError(
                f"model.distillation.layers: {layers}, but a student of {own} blocks needs {own} numbers from 1 to "
                f"{known}. Correct it, or leave it out"
            )
        return [0, *layers]

    def count_targets(self, batch: Any) -> Tensor:
        """Return the number of targets in the batch of a step, shape [], by which the loss is divided.

        What is added to it is a mean over all tokens of the step, whose number is taken here too.
        """
        targets = self.task.count_targets(batch)
        if self._compares_states:
            total = self.task.sum_over_ranks
            tokens = [total(inputs.real.sum()) for inputs in _inputs(self.task.model_inputs(batch))]
            self._weights = [total(targets) / count / len(tokens) for count in tokens]
        return targets

    def loss_sum(self, batch: Any) -> Tensor:
        """Return the loss of a micro-batch, shape []: summed over targets, and what is added in proportion."""
        model = self.task.model
        loss = model.with_weights(self._loss_sum, batch)
        if model.head_chunk is None:
            free_gathered(self.teacher)
        return loss

    def _loss_sum(self, batch: Any) -> Tensor:
        task, teacher = self.task, self.teacher
        given = task.model_inputs(batch)
        if not self._compares_states:
            with torch.no_grad():
                known = teacher.with_weights(teacher.hidden, *given)
            return self._loss_of_outputs(task.model.hidden(*given), known, batch.targets)
        with torch.no_grad(), recorded_states(teacher) as theirs:
            known = teacher.with_weights(teacher.hidden, *given)
        with recorded_states(task.model) as own:
            hidden = task.model.hidden(*given)
        loss = self._loss_of_outputs(hidden, known, batch.targets)
        for stack, (inputs, weight) in enumerate(zip(_inputs(given), self._weights, strict=True)):
            loss = loss + weight * self._loss_of_states(stack, own[stack], theirs[stack], inputs)
        return loss

    def _loss_of_outputs(self, own: tuple[Tensor, Any], known: tuple[Tensor, Any], targets: Tensor) -> Tensor:
        """Compare scores at all targets, or at `head_chunk` at a time, which are made again in the backward pass."""
        task, model, share, temperature = self.task, self.task.model, self.config.logits, self.config.temperature
        (hidden, copied), (known_hidden, known_copied) = own, known

        def loss(hidden: Tensor, known_hidden: Tensor, targets: Tensor) -> Tensor:
            scores = model.logits(hidden, copied)
            hard = task.criterion(scores, targets) * (1 - share) if share < 1 else scores.new_zeros(())
            if share == 0:
                return hard
            with torch.no_grad():
                taught = self.teacher.logits(known_hidden, known_copied)
            width = min(scores.shape[-1], taught.shape[-1])  # rows beyond the tokenizer's tokens are nobody's
            return hard + share * task.soft_criterion(scores[..., :width], taught[..., :width], targets, temperature)

        if model.head_chunk is not None:  # the gradient of `hidden` is whole when no scores are left to be made again
            hidden.register_hook(lambda _: free_gathered(self.teacher))
        return sum_in_chunks(loss, model.head_chunk, hidden, known_hidden, targets)

    def _loss_of_states(self, stack: int, own: list[Tensor], theirs: list[Tensor], inputs: PackedInputs) -> Tensor:
        config, compared = self.config, self._layers[stack]
        total = own[0].new_zeros((), dtype=torch.float32)
        if config.hidden:
            compare: Any = self.projections[stack] if self.projections else mean_hidden_loss
            total = total + config.hidden * compare(own, [theirs[layer] for layer in compared], inputs.real)
        if config.relations:
            blocks = (self.task.model.stacks[stack].blocks[-1], self.teacher.stacks[stack].blocks[compared[-1] - 1])
            total = total + config.relations * relation_loss(
                blocks[0], own[-2], blocks[1], theirs[compared[-1] - 1], inputs, config.relation_heads  # type: ignore[arg-type]
            )  # fmt: skip
        return total


def _inputs(given: tuple[Any, ...]) -> list[PackedInputs]:
    """Return what the stacks of a model read, in their order."""
    return [part for part in given if isinstance(part, PackedInputs)]
