"""Which model each task has."""

from __future__ import annotations

from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.models.classifier import Classifier
from leanbert.models.config import ResolvedConfig
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata
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


def make_model(config: ResolvedConfig, metadata: ModelMetadata) -> EncoderModel:
    """Return the model of the metadata's task, without its weights."""
    task, kind = metadata.task, kind_of(metadata.task)
    if kind == "mlm":
        return MaskedLanguageModel(config)
    if kind == "seq2seq":
        start, tokens = metadata.decoder_start or "encoder", metadata.target_vocab_size
        return Seq2SeqModel(config, metadata.decoder_layers, start, tokens, bool(metadata.copy))
    if not metadata.labels:
        raise UserError(f"a model of task {task} without its labels. Use another checkpoint")
    return Classifier(config, metadata.labels, kind, task)
