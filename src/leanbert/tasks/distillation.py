"""Training from a teacher: a trained model of the same task whose outputs and states the student learns.

The teacher is beside the task, not a part of it: it has no gradients, and is in no checkpoint.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

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
from leanbert.compression.teacher_outputs import Outputs, TeacherOutputs, forget_weights
from leanbert.distributed.parallelize import free_gathered, parallelize
from leanbert.distributed.sharding import shard_unit
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.heads import sum_in_chunks
from leanbert.models.packed_inputs import PackedInputs
from leanbert.tasks.teachers import DistillationConfig, check_distillation

if TYPE_CHECKING:
    from leanbert.tasks.base import Task

PROJECTIONS = "projections."
"""Prefix of the weights that only training with a teacher has."""


class Distillation:
    """A teacher, and the loss of a student that learns from it.

    Args:
        config: The settings.
        teacher: The model; it is not trained.
        task: The task, whose model is.

    Attributes:
        needed: Stack and number of the teacher's states that are compared, or whose relations are.
        kept: What the teacher gives for each training row, where that is on disk.
        projections: For each stack of blocks the map from the student's width to the teacher's, where hidden states are
            compared and the widths differ; trained with the student, and of no use afterwards.

    Raises:
        UserError: Student and teacher cannot be compared.

    """

    def __init__(self, config: DistillationConfig, teacher: EncoderModel, task: Task[Any]) -> None:
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
        self.needed = sorted(
            {(stack, layer) for stack, compared in enumerate(self._layers) for layer in compared if config.hidden}
            | {(stack, compared[-1] - 1) for stack, compared in enumerate(self._layers) if config.relations}
        )
        self.kept: TeacherOutputs | None = None
        self._weights: list[Tensor] = []

    @classmethod
    def build(
        cls, config: DistillationConfig, source: str, task: Task[Any], mesh: DeviceMesh | None, *,
        dtype: torch.dtype | None, fill: bool, offload: bool = False,
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

        teacher = parallelize(make, lambda _: None, mesh, dtype=dtype, offload=offload, fill=fill)
        made = cls(config, teacher, task)
        if mesh is not None:
            for projection in made.projections:
                shard_unit(projection, mesh, dtype, offload=offload)
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
        task = self.task
        given = task.model_inputs(batch)
        known = self.outputs(given) if self.kept is None else self.kept.read(batch)
        with self._recorded(task.model) as own:
            hidden = task.model.hidden(*given)
        loss = self._loss_of_outputs(hidden, known, batch.targets)
        if self._compares_states:
            for stack, (inputs, weight) in enumerate(zip(_inputs(given), self._weights, strict=True)):
                loss = loss + weight * self._loss_of_states(stack, own[stack], known, inputs)
        return loss

    def outputs(self, given: tuple[Any, ...]) -> Outputs:
        """Return what the student needs of what the teacher makes of `given`, which its model takes.

        What `EncoderModel.hidden` returns, as "hidden" and "copied", and the states [B, S, D] that are needed.
        """
        teacher = self.teacher
        with torch.no_grad(), self._recorded(teacher) as states:
            hidden, copied = teacher.with_weights(teacher.hidden, *given)
        scored = {"hidden": hidden, "copied": copied} if self.config.logits else {"copied": None}
        return {**scored, **{_state(stack, layer): states[stack][layer] for stack, layer in self.needed}}

    def keep(self, outputs: TeacherOutputs) -> None:
        """Read the teacher's outputs from now on, and let go of those of its weights that no loss needs."""
        self.kept = outputs
        needed = [*self.teacher.output_weights] if self.config.logits else []
        for stack, compared in zip(self.teacher.stacks, self._layers, strict=True):
            if self.config.relations:
                block: Any = stack.blocks[compared[-1] - 1]
                needed += [*block.attention.qkv.parameters(), *block.attention_norm.parameters()]
        forget_weights(self.teacher, needed)

    def _recorded(self, model: EncoderModel) -> AbstractContextManager[list[list[Tensor]]]:
        return recorded_states(model) if self._compares_states else nullcontext([])

    def _loss_of_outputs(self, own: tuple[Tensor, Any], known: Outputs, targets: Tensor) -> Tensor:
        """Compare scores at all targets, or at `head_chunk` at a time, which are made again in the backward pass."""
        task, model, share, temperature = self.task, self.task.model, self.config.logits, self.config.temperature
        hidden, copied = own
        known_hidden = known["hidden"] if share else hidden  # which nothing looks at then

        def loss(hidden: Tensor, known_hidden: Tensor, targets: Tensor) -> Tensor:
            scores = model.logits(hidden, copied)
            hard = task.criterion(scores, targets) * (1 - share) if share < 1 else scores.new_zeros(())
            if share == 0:
                return hard
            with torch.no_grad():
                taught = self.teacher.logits(known_hidden, known["copied"])
            width = min(scores.shape[-1], taught.shape[-1])  # rows beyond the tokenizer's tokens are nobody's
            return hard + share * task.soft_criterion(scores[..., :width], taught[..., :width], targets, temperature)

        if model.head_chunk is not None:  # the gradient of `hidden` is whole when no scores are left to be made again
            hidden.register_hook(lambda _: free_gathered(self.teacher))
        return sum_in_chunks(loss, model.head_chunk, hidden, known_hidden, targets)

    def _loss_of_states(self, stack: int, own: list[Tensor], known: Outputs, inputs: PackedInputs) -> Tensor:
        config, compared = self.config, self._layers[stack]
        total = own[0].new_zeros((), dtype=torch.float32)
        if config.hidden:
            compare: Any = self.projections[stack] if self.projections else mean_hidden_loss
            theirs = [known[_state(stack, layer)] for layer in compared]
            total = total + config.hidden * compare(own, theirs, inputs.real)
        if config.relations:
            blocks = (self.task.model.stacks[stack].blocks[-1], self.teacher.stacks[stack].blocks[compared[-1] - 1])
            total = total + config.relations * relation_loss(
                blocks[0], own[-2], blocks[1], known[_state(stack, compared[-1] - 1)], inputs, config.relation_heads  # type: ignore[arg-type]
            )  # fmt: skip
        return total


def _state(stack: int, layer: int) -> str:
    """Return the name of a state among the teacher's outputs."""
    return f"state-{stack}-{layer}"


def _inputs(given: tuple[Any, ...]) -> list[PackedInputs]:
    """Return what the stacks of a model read, in their order."""
    return [part for part in given if isinstance(part, PackedInputs)]


def take_projections(task: Task[Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that a task takes: those of projections only in training.

    Raises UserError if it trains and they are not those of its teacher.
    """
    needed, found = ({name for name in names if name.startswith(PROJECTIONS)} for names in (task.state_dict(), weights))
    if task.trains and needed != found:
        raise UserError(
            "model.distillation: the checkpoint was trained with another teacher, or none, whose states are not "
            "of the same width. Give its settings, or start from it with --model.init_from"
        )
    return weights if task.trains else {name: weights[name] for name in weights if name not in found}
