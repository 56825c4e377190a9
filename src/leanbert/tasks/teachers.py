"""Which teacher a student has, what it learns of it, and how the teacher is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from leanbert.data.module import RowData
from leanbert.data.pairs import TARGET
from leanbert.data.tokenizers.tokenizer import TextTokenizer
from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
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
    cache: bool = False
    """Run the teacher once over all training rows, before the first step, and keep what the student needs of it in
    data.cache_dir: its blocks leave memory. Not for masked language modelling, which draws new masks in each epoch."""

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
