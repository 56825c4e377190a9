"""Records of every task: as samples in each format, as the data modules read them, and as others do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import references
from .samples import write_json_lines

FIELDS = {
    "mlm": ("text",),
    "classification": ("text", "label"),
    "tagging": ("tokens", "labels"),
    "srl": ("tokens", "predicate", "labels"),
    "translation": ("source", "target"),
    "summarization": ("source", "target"),
}


def data_module(task: str, **settings: Any) -> Any:
    """Return the data module of a task with small settings."""
    from leanbert.data.classification import ClassificationData
    from leanbert.data.mlm import MaskedLMData
    from leanbert.data.pairs import PairData
    from leanbert.data.token_labels import SemanticRoleData, TokenLabelData

    own: dict[str, tuple[type, dict[str, Any]]] = {
        "mlm": (MaskedLMData, {}),
        "classification": (ClassificationData, {}),
        "tagging": (TokenLabelData, {}),
        "srl": (SemanticRoleData, {"find_predicates": False}),
    }
    kind, more = own.get(task, (PairData, {}))
    return kind(**{"cache_dir": "cache", "max_length": 16, "batch_size": 4, "vocab_size": 300, **more, **settings})


def write_format(path: Path, task: str) -> None:
    """Write the sample records of a task in the format that the name of the file asks for."""
    records = sample_records(path.parent, task)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    names = FIELDS[task]
    if kind == "jsonl":
        write_json_lines(path, records)
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: [record[name] for record in records] for name in names}), path)
    elif kind in ("csv", "tsv"):
        rows = [names, *([str(record[name]) for name in names] for record in records)]
        path.write_text("".join(("," if kind == "csv" else "\t").join(row) + "\n" for row in rows))
    else:
        source = {"mlm": "train.txt", "tagging": "train.conll", "translation": "source.en"}[task]
        shutil.copy(path.parent / source, path)


def sample_records(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the records of a task."""
    if task == "srl":
        return [json.loads(line) for line in (folder / "roles.jsonl").read_text().splitlines()]
    sentences = (folder / "source.en").read_text().splitlines()
    if task == "tagging":
        return [{"tokens": text.split(), "labels": ["O"] * len(text.split())} for text in sentences]
    return [{"text": t, "label": t.split()[0], "source": t, "target": t[::-1]} for t in sentences]


def records_read(task: str, module: Any, path: str) -> list[references.Record]:
    """Return what the data module has read of a file, in the form of the independent readers."""
    from leanbert.data.formats.corpora import Corpus

    if task == "mlm":
        texts: list[str] = []
        for piece in Corpus((path,)).pieces():
            texts = [*texts, piece.text] if piece.begins else [*texts[:-1], texts[-1] + piece.text]
        return references.plain((text,) for text in texts)
    if task == "classification":
        return references.plain((texts[0], label) for _, texts, label in module.reader.read([path], 0.0, 1.0))
    if task in ("tagging", "srl"):
        found = module.reader.read([path])
        if task == "srl":
            return references.plain((s.tokens, s.predicate, _types(labels)) for _, s, labels in found)
        return references.plain((s.tokens, _types(labels)) for _, s, labels in found)
    return references.plain((pair.source, pair.target) for pair in module.pairs("train"))


def _types(labels: Sequence[str]) -> list[str]:
    """Return the types of tags: how a span begins depends on the scheme, which readers may exchange."""
    return [label.removeprefix("B-").removeprefix("I-") for label in " ".join(labels).split()]


def expected_records(task: str, path: Path, lone_return: str) -> list[references.Record]:
    """Return what a task has to read of a file."""
    data = path.read_bytes()
    expected = references.read(path, FIELDS[task], "\n" if b"\n" not in data else lone_return)
    if path.suffix == ".lines":
        targets = references.read(path.with_name("target.xx"), ("target",))
        expected = [(source, target) for (source,), (target,) in zip(expected, targets, strict=True)]
    if task in ("tagging", "srl"):
        expected = [(*record[:-1], " ".join(_types(record[-1].split()))) for record in expected]
    return [record for record in expected if record[0] or task != "mlm"]
