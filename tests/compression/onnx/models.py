"""Tiny models of every task, whose every path matters."""

from __future__ import annotations

import torch

from leanbert.compression.pruning import apply_masks, magnitude_masks, prunable
from leanbert.models.classifier import Classifier
from leanbert.models.mlm import MaskedLanguageModel
from leanbert.models.seq2seq import Seq2SeqModel
from leanbert.models.stored import ModelMetadata
from leanbert.pretrained.build import initialise
from tests.tiny import tiny_config

LABELS = ["O", "B-x", "I-x"]


def make(task, preset="modern", copy=False, targets=None, **changes):
    """Return a model in evaluation mode and its metadata."""
    torch.manual_seed(0)
    config = tiny_config(preset=preset, vocab_size=100, **changes).resolved()
    if task == "mlm":
        model = MaskedLanguageModel(config)
    elif task == "seq2seq":
        model = Seq2SeqModel(config, 3, "encoder", targets, copy)
    else:
        model = Classifier(config, LABELS, "text" if task == "classification" else "word", task)
    initialise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    labels = LABELS if isinstance(model, Classifier) else None
    layers = 3 if task == "seq2seq" else None
    metadata = ModelMetadata(
        task, max_length=16, labels=labels, decoder_layers=layers, target_vocab_size=targets, copy=copy or None
    )
    return model.eval(), metadata


def pruned(task, sparsity=0.8, **settings):
    """Return the same, with this share of zeros in each matrix and embedding."""
    model, metadata = make(task, **settings)
    weights = prunable(model, include_embeddings=True)
    apply_masks(weights, magnitude_masks(weights, sparsity, "layer"))
    return model, metadata
