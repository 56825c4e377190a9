"""Samples that every machine has, as files in the cache: docstrings, and what a grammar makes up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from leanbert.data.samples.docstring_examples import FORMAT, docstring_records
from leanbert.data.samples.docstrings import embedded_corpus, installed_libraries, versions_key
from leanbert.data.samples.synthetic import SPLITS, synthetic_roles, synthetic_translation
from leanbert.data.store.cache import made_once

Sample = Literal["docstrings", "classification", "summarization", "translation", "srl"]
Records = dict[str, list[dict[str, Any]]]
"""Examples by split."""

SYNTHETIC_FORMAT = 2
"""Part of the folder's name: raise it when the grammars change."""
SYNTHETIC: dict[str, Callable[[], Records]] = {"translation": synthetic_translation, "srl": synthetic_roles}


def embedded_files(sample: Sample, cache_dir: Path) -> dict[Any, Path]:
    """Return the files of "train", "val" and "test" (.jsonl), made if they are not in the cache.

    Docstrings are one text file for all parts. Summarization (a docstring's body and its first line) and classification
    (the library that a docstring is of) are real text; translation and semantic role labelling are synthetic.
    """
    if sample == "docstrings":
        return dict.fromkeys(SPLITS, embedded_corpus(cache_dir))
    synthetic = SYNTHETIC.get(sample)
    libraries = {} if synthetic else installed_libraries()
    name = f"{sample}-{SYNTHETIC_FORMAT}" if synthetic else f"docstring-examples-{FORMAT}-{versions_key(libraries)}"
    folder = cache_dir / "corpora" / name

    def make(building: Path) -> None:
        found = {sample: synthetic()} if synthetic else docstring_records(libraries)
        for kind, parts in found.items():
            for part, records in parts.items():
                text = "".join(json.dumps(record) + "\n" for record in records)
                (building / f"{kind}-{part}.jsonl").write_text(text, encoding="utf-8", newline="\n")

    made_once(folder, make)
    return {part: folder / f"{sample}-{part}.jsonl" for part in SPLITS}
