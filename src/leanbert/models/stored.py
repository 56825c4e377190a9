"""A model as it is on disk."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from leanbert.models.config import ResolvedConfig

StateDict = dict[str, Tensor]


class Stored(NamedTuple):
    """A model on disk: the encoder's settings, the weights by our names, its task, and what else it is made of.

    `facts` are primitives: those that data module and task keep (labels, the decoder's layers), and "max_length", the
    tokens of the rows that it was trained on. Each may be absent.
    """

    config: ResolvedConfig
    state: StateDict
    task: str
    facts: dict[str, Any]
