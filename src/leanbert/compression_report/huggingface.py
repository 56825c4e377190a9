"""Variants as Hugging Face folders, in 32 bits: for `transformers`, and to train them on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from leanbert.api import Pretrained
from leanbert.compression_report.report import Row
from leanbert.errors import UserError

FOLDER = "hf"
"""Below that of a variant."""


def leave_huggingface(model: Pretrained, row: Row, output: Path, folder: str, others: Iterable[Row] = ()) -> None:
    """Write the model of a variant, as it is before quantization, to `folder` below `output`, and say so in its row.

    Where transformers has no class for it the row has the reason. One of the `others` that differs only in its
    quantization has the folder already.
    """
    for other in others:
        if other.changes == row.changes:
            row.huggingface, row.no_huggingface = other.huggingface, other.no_huggingface
            return
    try:
        model.export(output / folder)
        row.huggingface = folder
    except UserError as error:
        row.no_huggingface = str(error)
