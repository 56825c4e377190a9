"""All ranks train the same model on the same data: compared before anything is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from leanbert.callbacks.values import data_of
from leanbert.errors import UserError
from leanbert.tasks.metrics import over_ranks

MAY_DIFFER = ("data.cache_dir",)
"""Settings that may be each machine's own."""


class SameOnAllRanks(Callback):
    """End a run on all ranks where one has other settings, or other data, than the first.

    Args:
        settings: Returns the settings, nested by name.

    """

    def __init__(self, settings: Callable[[], dict[str, Any]]) -> None:
        self.settings = settings

    def compare_settings(self) -> None:
        """Compare before ranks exchange anything else. Raises UserError."""
        compare(flat(self.settings()))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare what was prepared. Raises UserError."""
        if trainer.world_size > 1:
            caches = data_of(trainer).caches.items()
            compare({f"data.{part}_files": f"{each.count:,} examples, {each.folder.name[:8]}" for part, each in caches})


def compare(own: dict[str, str]) -> None:
    """Compare by digest what ranks have. Raises UserError, the same on all, that names what differs and where."""
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(over_ranks([digest]))) > 1:
        raise UserError(difference(over_ranks([own])))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings by their names on the command line, as text, but for those that may differ."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        whole = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
        found |= flat(value, whole) if isinstance(value, dict) and value else {whole: str(value)}
    return {name: value for name, value in found.items() if name not in MAY_DIFFER}


def difference(ranks: Sequence[Mapping[str, str]]) -> str:
    """Return what the first rank that differs from rank 0 has otherwise."""
    rank, name = next(
        (rank, name)
        for rank, own in enumerate(ranks)
        for name in {**ranks[0], **own}
        if ranks[0].get(name) != own.get(name)
    )
    here, there = (ranks[each].get(name, "not set") for each in (0, rank))
    return f"{name}: is {here} on rank 0 and {there} on rank {rank}. Give all ranks the same settings and files."
