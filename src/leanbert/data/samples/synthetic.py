"""Small made-up data sets, drawn from grammars by a seed: something to translate and to label without a download.

Sentences of a split are distinct, and none is in two splits. They are called synthetic wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from leanbert.data.samples.draw import Draw
from leanbert.data.samples.roles import role_records
from leanbert.data.samples.translation import translation_pair

SPLITS = ("train", "val", "test")
Record = dict[str, Any]


def synthetic_translation(train: int = 4000, val: int = 200, test: int = 200, seed: int = 0) -> dict[str, list[Record]]:
    """Return records {"source", "target"} by split: English, and a toy language with the verb at the end."""
    return _splits(lambda draw: [translation_pair(draw)], "source", (train, val, test), seed)


def synthetic_roles(train: int = 3000, val: int = 200, test: int = 200, seed: int = 0) -> dict[str, list[Record]]:
    """Return records {"tokens", "predicate", "labels"} by split: at least that many, for no sentence is cut in two.

    There is a record for each predicate of a sentence; labels are BIO tags of PropBank's roles.
    """
    return _splits(role_records, "tokens", (train, val, test), seed)


def _splits(
    make: Callable[[Draw], list[Record]], field: str, sizes: tuple[int, ...], seed: int
) -> dict[str, list[Record]]:
    """Return the records of sentences, in the `field`, that did not come before."""
    draw, seen = Draw(seed), set[str]()
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for records, size in zip(splits.values(), sizes, strict=True):
        while len(records) < size:
            made = make(draw)
            sentence = str(made[0][field])
            if sentence not in seen:
                seen.add(sentence)
                records += made
    return splits
