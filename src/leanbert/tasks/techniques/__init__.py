"""All memory techniques of a run in one place: their settings, their order, and what cannot combine.

Callbacks write their settings into `Techniques` before the model is built; the task applies them.
"""

from __future__ import annotations

from leanbert.errors import UserError
from leanbert.models.base import EncoderModel
from leanbert.tasks.techniques.contract import Surroundings, Technique, Techniques
from leanbert.tasks.techniques.listed import TECHNIQUES

__all__ = ["TECHNIQUES", "Surroundings", "Technique", "Techniques", "advice", "apply", "refuse"]


def refuse(techniques: Techniques, around: Surroundings) -> None:
    """Raise UserError, with the reason and the fix, for a combination that cannot work."""
    for technique in (*TECHNIQUES, *techniques.own):
        for reason in technique.conflicts(techniques, around):
            raise UserError(reason)


def apply(techniques: Techniques, model: EncoderModel, *, compile_blocks: bool = False) -> None:
    """Apply to a model that has its initial weights, in the order of the list, a user's own after; compile last."""
    for technique in (*TECHNIQUES, *techniques.own):
        technique.apply(model, techniques)
    if compile_blocks:
        for block in model.blocks:
            block.compile()


def advice() -> dict[str, list[str]]:
    """Return what helps when memory runs out, by the category of live bytes that there are most of."""
    found: dict[str, list[str]] = {}
    for technique in TECHNIQUES:
        if technique.eases is not None:
            effect = f"lowers {technique.lowers}; it costs {technique.costs}"
            found.setdefault(technique.eases, []).append(f"--config configs/memory/{technique.name}.yaml {effect}")
    return found
