"""Samples that every machine has, as files in the cache: docstrings, and what a grammar makes up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from leanbert.data.samples.docstring_examples import embedded_examples
from leanbert.data.samples.docstrings import embedded_corpus
from leanbert.data.samples.synthetic import synthetic_roles, synthetic_translation
from leanbert.data.store.cache import made_once

Sample = Literal["docstrings", "classification", "summarization", "translation", "srl"]

PARTS = ("train", "val", "test")

SYNTHETIC_FORMAT = 1
"""Part of the folder's name: raise it when the grammars change."""
SYNTHETIC: dict[str, Callable[[], dict[str, list[dict[str, Any]]]]] = {
    "translation": synthetic_translation,
    "srl": synthetic_roles,
}


def embedded_files(sample: Sample, cache_dir: Path) -> dict[Any, Path]:
    """Return the files of "train", "val" and "test" (.jsonl), made if they are not in the cache.

    Docstrings are one text file for all parts. Summarization (a docstring's body and its first line) and classification
    (the library that a docstring is of) are real text; translation and semantic role labelling are synthetic.
    """
    if sample == "docstrings":
        return dict.fromkeys(PARTS, embedded_corpus(cache_dir))
    if sample == "classification" or sample == "summarization":
        return dict(embedded_examples(sample, cache_dir))
    folder = cache_dir / "corpora" / f"{sample}-{SYNTHETIC_FORMAT}"

    def make(building: Path) -> dict[str, Any]:
        for part, records in SYNTHETIC[sample]().items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (building / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        return {}

    made_once(folder, make)
    return {part: folder / f"{part}.jsonl" for part in PARTS}
