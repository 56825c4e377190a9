"""Answers of `predict` as JSON lines on standard output, in input order, as they come."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert import signals, strict_json
from leanbert.tasks.base import Answer


class PredictionWriter(Callback):
    """Write each answer of `predict_step` as one JSON object a line."""

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Sequence[Answer], *_: object, **__: object
    ) -> None:
        """Write the batch's answers."""
        with signals.held():  # no line is cut in half
            for answer in outputs:
                sys.stdout.write(strict_json.dumps(answer, ensure_ascii=False) + "\n")
            sys.stdout.flush()
