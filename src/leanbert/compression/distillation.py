"""Distillation: by how much a student's outputs, hidden states and attention differ from its teacher's.

All losses are sums, in float32, over the places that count: what is divided by their number is the mean of a step.

Shapes: B batch, S sequence, M targets, L labels or vocabulary, D hidden, R relation heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.decoder import DecoderBlock
from leanbert.models.encoder import Block
from leanbert.models.kernels.attention import same_document
from leanbert.models.packed_inputs import PackedInputs


@contextmanager
def recorded_states(model: EncoderModel) -> Iterator[list[list[Tensor]]]:
    """Collect for each stack of `model` the hidden states [B, S, D] of the embeddings and after each block."""
    found: list[list[Tensor]] = [[] for _ in model.stacks]
    try:
        for stack, states in zip(model.stacks, found, strict=True):
            stack.states = states
        yield found
    finally:
        for stack in model.stacks:
            stack.states = None


def soft_loss(scores: Tensor, teacher_scores: Tensor, temperature: float) -> Tensor:
    """Return the divergence of the student's distribution from the teacher's, [B, M], of scores [B, M, L].

    KL(teacher || student) at a temperature, times its square, so that gradients keep their size: Hinton et al. 2015,
    arXiv 1503.02531.
    """
    student = (scores.float() / temperature).log_softmax(-1)
    teacher = (teacher_scores.float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def soft_binary_loss(scores: Tensor, teacher_scores: Tensor, temperature: float) -> Tensor:
    """Return the same for labels that are given or not, each by itself: [B, M, L]."""
    student, teacher = scores.float() / temperature, teacher_scores.float() / temperature
    lost = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none")
    least = F.binary_cross_entropy_with_logits(teacher, teacher.sigmoid(), reduction="none")
    return (lost - least) * temperature**2


def hidden_loss(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """Return the squared distance of hidden states [B, S, D] in units of the teacher's square, shape [].

    It is summed over `real` places (bool [B, S]). Sun et al. 2019, arXiv 1908.09355, compare states that are scaled
    to length 1; here the student learns the teacher's length too.
    """
    teacher = teacher.float()
    distance = (student.float() - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-6)
    return (distance * real).sum()


def mean_hidden_loss(student: Iterable[Tensor], teacher: Sequence[Tensor], real: Tensor) -> Tensor:
    """Return the mean of `hidden_loss` over pairs of states, shape []."""
    losses = [hidden_loss(state, known, real) for state, known in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


class Projection(nn.Linear):
    """Compares states of a student with wider ones of its teacher, by a learned map without a bias.

    All in one pass, for where it is sharded each pass gathers the weight and reduces its gradient.
    """

    def forward(  # type: ignore[override]
        self, student: Iterable[Tensor], teacher: Sequence[Tensor], real: Tensor
    ) -> Tensor:
        """Return `mean_hidden_loss` of the student's states, mapped one by one."""
        return mean_hidden_loss(map(super().forward, student), teacher, real)


def relation_loss(
    student: Block | DecoderBlock, states: Tensor, teacher: Block | DecoderBlock, teacher_states: Tensor,
    inputs: PackedInputs, heads: int,
) -> Tensor:  # fmt: skip
    """Return how much the relations among queries, among keys and among values differ, shape [].

    Each token's distribution over the tokens of its document, by the products of their vectors in `heads` slices,
    compared by KL divergence, as the mean over the heads of all three: Wang et al. 2021, arXiv 2012.15828 (MiniLMv2).
    Student and teacher may differ in width and heads. It is summed over the tokens of `inputs`.

    Args:
        student: The student's block.
        states: What goes into it, [B, S, D].
        teacher: The teacher's block.
        teacher_states: What goes into it.
        inputs: The tokens [B, S].
        heads: R, which divides the width of both blocks' queries.

    """
    allowed = same_document(inputs.document_ids, inputs.document_ids)  # [B, 1, S, S]
    students = _all_relations(student, states, allowed, heads)
    teachers = _all_relations(teacher, teacher_states, allowed, heads)
    total = states.new_zeros((), dtype=torch.float32)
    for own, known in zip(students, teachers, strict=True):
        divergence = F.kl_div(own, known, reduction="none", log_target=True)
        total = total + (divergence.where(allowed, 0.0).sum(-1).mean(1) * inputs.real).sum()  # over [B, S]
    return total / 3


def _all_relations(block: Block | DecoderBlock, states: Tensor, allowed: Tensor, heads: int) -> list[Tensor]:
    """Return `_relations` of queries, of keys and of values."""
    return block.with_weights(
        lambda states: [_relations(vectors, allowed) for vectors in _vectors(block, states, heads)], states
    )


def _vectors(block: Block | DecoderBlock, states: Tensor, heads: int) -> Sequence[Tensor]:
    """Return queries, keys and values [B, R, S, d] of a block, before positions turn them."""
    fused = block.attention.qkv(block.attention_norm(states) if block.pre_norm else states)  # [B, S, 3 * H * d]
    return fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _relations(vectors: Tensor, allowed: Tensor) -> Tensor:
    """Return log-probabilities [B, R, S, S] of vectors [B, R, S, d]; they are finite where nothing is allowed too."""
    vectors = vectors * vectors.shape[-1] ** -0.25  # before the product, which float16 may not hold
    scores = (vectors @ vectors.mT).float()
    return scores.masked_fill(~allowed, torch.finfo(torch.float32).min).log_softmax(-1)


def check_teacher(student: EncoderModel, teacher: EncoderModel, relation_heads: int | None) -> None:
    """Raise `UserError` if the teacher's scores or relations cannot be compared with the student's."""
    if student.task != teacher.task:
        raise UserError(f"model.distillation.teacher: is of task {teacher.task}, not {student.task}. Give another")
    own, known = (getattr(model, "labels", None) for model in (student, teacher))
    if own != known:
        raise UserError(f"model.distillation.teacher: has the labels {known}, the data have {own}. Give the same ones")
    if relation_heads is None:
        return
    for who, model in (("student", student), ("teacher", teacher)):
        width = model.config.num_heads * model.config.head_size
        if width % relation_heads:
            raise UserError(
                f"model.distillation.relation_heads: {relation_heads} do not divide the {width} numbers of the {who}'s "
                "queries. Give a divisor"
            )
