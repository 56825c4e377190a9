"""Examples to fine-tune on that every machine has, out of the docstrings that also make up the embedded corpus.

Summarization: from the body of a docstring to its first line. Classification: which library a docstring comes from.
Both are real tasks; what the examples are depends on the installed versions only.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution
from itertools import accumulate

from leanbert.data.formats.documents import document_hash, text_hash
from leanbert.data.samples.docstrings import labelled_docstrings

FORMAT = 2
"""Part of the folder's name: raise it when the choice of examples changes."""

Record = dict[str, str]
Labelled = tuple[str, list[str]]
"""A library and the paragraphs of one of its docstrings."""

SPLITS = {"train": 0.9, "val": 0.95, "test": 1.0}
"""The hash of a text, in [0, 1), is below the number of its split."""

LONGEST_SUMMARY_WORDS = 20
SMALLEST_DOCUMENT_WORDS = 20
SMALLEST_TEXT_WORDS = 12
LARGEST_WORDS = 200
"""Of a document or text; whole paragraphs are kept as long as they fit."""

LABELS = 10
LARGEST_PER_LABEL = 1200

_SENTENCE_END_INSIDE = re.compile(r"[.!?:;]\s")
_SUMMARY = re.compile(r"[A-Z].*[^.]\.")


def docstring_records(libraries: Mapping[str, Distribution]) -> dict[str, dict[str, list[Record]]]:
    """Return the records of "summarization" and "classification", by split: harvesting takes long, and serves both.

    Records are {"document", "summary"} for summarization and {"text", "label"} for classification.
    """
    docstrings = list(without_repeats(labelled_docstrings(libraries)))
    return {
        "summarization": _split(summaries(docstrings), "document"),
        "classification": _split(origins(docstrings), "text"),
    }


def without_repeats(docstrings: Iterable[Labelled]) -> Iterator[Labelled]:
    """Yield the docstrings whose first paragraph is new: what is inherited or copied would be in several splits."""
    seen: set[str] = set()
    for library, paragraphs in docstrings:
        first = paragraphs[0].casefold()
        if first not in seen:
            seen.add(first)
            yield library, paragraphs


def summaries(docstrings: Iterable[Labelled]) -> list[Record]:
    """Return {"document", "summary"} of the docstrings that begin with one short sentence and go on, in random order.

    The summary is that sentence; the document is what follows, at most `LARGEST_WORDS` words.
    """
    records: dict[str, Record] = {}
    for _, (summary, *body) in docstrings:
        document = _beginning(body)
        one_sentence = _SUMMARY.fullmatch(summary) and not _SENTENCE_END_INSIDE.search(summary)
        short = len(summary.split()) <= LONGEST_SUMMARY_WORDS
        if one_sentence and short and len(document.split()) >= SMALLEST_DOCUMENT_WORDS:
            records.setdefault(document, {"document": document, "summary": summary})
    return _shuffled(records.values())


def origins(docstrings: Iterable[Labelled]) -> list[Record]:
    """Return {"text", "label"} of the `LABELS` libraries with most docstrings, in random order.

    A label, the name of the library, has at most `LARGEST_PER_LABEL` texts, drawn by their hash.
    """
    found: defaultdict[str, dict[str, Record]] = defaultdict(dict)
    for library, paragraphs in docstrings:
        text = _beginning(paragraphs)
        if len(text.split()) >= SMALLEST_TEXT_WORDS:
            found[library].setdefault(text, {"text": text, "label": library})
    largest = sorted(found, key=lambda library: (-len(found[library]), library))[:LABELS]
    chosen = (_shuffled(found[library].values())[:LARGEST_PER_LABEL] for library in largest)
    return _shuffled(record for records in chosen for record in records)


def _beginning(paragraphs: list[str]) -> str:
    """Join the first paragraphs by a space, as many as have at most `LARGEST_WORDS` words."""
    words = accumulate(len(paragraph.split()) for paragraph in paragraphs)
    return " ".join(paragraphs[: sum(count <= LARGEST_WORDS for count in words)])


def _shuffled(records: Iterable[Record]) -> list[Record]:
    """Order by a hash that has nothing to do with the one that decides the split."""
    return sorted(records, key=lambda record: text_hash(json.dumps(record)))


def _split(records: list[Record], field: str) -> dict[str, list[Record]]:
    """Divide records by the hash of the text in a field."""
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for record in records:
        number = document_hash(record[field])
        splits[next(split for split, below in SPLITS.items() if number < below)].append(record)
    return splits
