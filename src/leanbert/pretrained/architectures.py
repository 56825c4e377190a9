"""Which model each task has."""

from __future__ import annotations

from typing import Any

from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.classifier import Classifier
from leanbert.models.config import ResolvedConfig
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.pretrained.huggingface.naming import Kind

TASKS: dict[Kind, tuple[str, ...]] = {
    "mlm": ("mlm",),
    "text": ("classification",),
    "word": ("tagging", "srl"),
    "seq2seq": ("seq2seq",),
}
"""Tasks by the kind of their model; of a folder that names none, it is the first."""


def kind_of(task: str) -> Kind:
    """Return the kind of a task's model. Raises `UserError` for a task that there is not."""
    for kind, tasks in TASKS.items():
        if task in tasks:
            return kind
    raise UserError(f"a model of task {task!r}, which is unknown here. Use the LeanBERT that has trained it")


def make_model(config: ResolvedConfig, task: str, facts: dict[str, Any]) -> EncoderModel:
    """Return the model of a task, without its weights; `facts` are those of `Stored`."""
    kind = kind_of(task)
    if kind == "mlm":
        return MaskedLanguageModel(config)
    if kind == "seq2seq":
        start = facts.get("decoder_start", "encoder")
        return Seq2SeqModel(
            config, facts.get("decoder_layers"), start, task, facts.get("target_vocab_size"), facts.get("copy", False)
        )
    if not isinstance(labels := facts.get("labels"), list) or not labels:
        raise UserError(f"a model of task {task} without its labels. Use another checkpoint")
    return Classifier(config, labels, kind, task)
