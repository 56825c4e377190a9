"""Small made-up data sets, drawn from grammars by a seed: something to translate and to label without a download.

Sentences of a split are distinct, and none is in two splits. They are called synthetic wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

from leanbert.data.samples.draw import Draw
from leanbert.data.samples.roles import role_records
from leanbert.data.samples.translation import translation_pair

T = TypeVar("T")
SPLITS = ("train", "val", "test")


def synthetic_translation(
    train: int = 4000, val: int = 200, test: int = 200, seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """Return records {"source", "target"} by split: English, and a toy language with the verb at the end."""
    sentences = _distinct(translation_pair, lambda pair: pair["source"], seed)
    return {name: [next(sentences) for _ in range(size)] for name, size in zip(SPLITS, (train, val, test), strict=True)}


def synthetic_roles(
    train: int = 3000, val: int = 200, test: int = 200, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """Return records {"tokens", "predicate", "labels"} by split: at least that many, for no sentence is cut in two.

    There is a record for each predicate of a sentence; labels are BIO tags of PropBank's roles.
    """
    sentences = _distinct(role_records, lambda records: tuple(records[0]["tokens"]), seed)
    splits: dict[str, list[dict[str, Any]]] = {}
    for name, size in zip(SPLITS, (train, val, test), strict=True):
        splits[name] = []
        while len(splits[name]) < size:
            splits[name] += next(sentences)
    return splits


def _distinct(make: Callable[[Draw], T], key: Callable[[T], Hashable], seed: int) -> Iterator[T]:
    draw = Draw(seed)
    seen: set[Hashable] = set()
    while True:
        item = make(draw)
        if key(item) not in seen:
            seen.add(key(item))
            yield item
