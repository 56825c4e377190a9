"""Columns of .parquet files and of Hugging Face data sets, as records, some rows at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from leanbert.data.formats.fields import Record, columns_of
from leanbert.data.formats.readers import Report, open_binary, what_it_is
from leanbert.errors import UserError

FORM = "hf:NAME_OR_FOLDER[:[CONFIGURATION:]SPLIT]"
"""How data sets are named."""

ROWS_TOGETHER = 256
"""Rows that are read at a time."""


def parquet_records(
    path: Path, wanted: Sequence[str], optional: Sequence[str], report: Report
) -> Iterator[tuple[str, Record]]:
    """Yield ("file, row N", record) of a .parquet file: the columns of the fields.

    Raises UserError: pyarrow is not there, the file cannot be read, or has not the `wanted` fields.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f'{path}: .parquet needs pyarrow. Run: pip install "leanbert[parquet]"') from error
    with open_binary(path) as stream:
        head = stream.read(64)
    what = None if head.startswith(b"PAR1") else what_it_is(head)
    if what is not None:
        raise UserError(f"{path}: {what}")

    def rows() -> Iterator[Record]:
        with parquet.ParquetFile(path) as file:
            columns = columns_of(str(path), file.schema_arrow.names, wanted, optional)
            features = _features_of(file.schema_arrow.metadata)
            for batch in file.iter_batches(batch_size=ROWS_TOGETHER, columns=columns):
                for row in batch.to_pylist():
                    yield {name: with_names(value, features.get(name)) for name, value in row.items()}

    yield from _numbered(rows(), str(path), "not a readable parquet file", "Copy it again")
    report(path.stat().st_size)


class DatasetName(NamedTuple):
    """What `FORM` says; the split is `train` if none is given."""

    name: str
    split: str = "train"
    configuration: str | None = None


def split_dataset_spec(spec: str) -> DatasetName:
    """Cut the name of a data set into its parts. Raises UserError if there are too many."""
    parts = re.split(r":(?![^\[]*\])", spec.removeprefix("hf:"))  # but not at that of train[:1000]
    names = [":".join(parts[:count]) for count in range(1, len(parts) + 1)]
    count = max((count for count, name in enumerate(names, start=1) if os.path.exists(name)), default=1)
    if len(parts) > count + 2:
        raise UserError(f"{spec}: too many colons. Write {FORM}")
    return DatasetName(names[count - 1], *reversed(parts[count:]))


def open_dataset(spec: str) -> Any:
    """Return the `datasets.Dataset` of a name.

    A folder may hold data files or what `Dataset.save_to_disk` wrote. Raises `UserError` without `datasets`,
    and for what it cannot load.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'{spec}: needs datasets. Run: pip install "leanbert[hf]"') from error
    name, split, configuration = split_dataset_spec(spec)
    try:
        if (Path(name) / "state.json").exists():
            found = datasets.load_from_disk(name)
        elif (Path(name) / "dataset_dict.json").exists():
            found = datasets.load_from_disk(name)[split]
        else:
            found = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:
        raise UserError(
            f"{spec}: cannot be loaded ({type(error).__name__}: {_one_line(error)}). Write {FORM}"
        ) from error
    return found.with_format(None)


def dataset_records(spec: str, wanted: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Record]]:
    """Yield ("name, row N", record) of a Hugging Face data set, from its memory-mapped files."""
    dataset = open_dataset(spec)
    columns = columns_of(spec, dataset.column_names, wanted, optional)
    features = dataset.features.to_dict()

    def rows() -> Iterator[Record]:
        for batch in dataset.select_columns(columns).iter(batch_size=ROWS_TOGETHER):
            for values in zip(*(batch[column] for column in columns), strict=True):
                yield {name: with_names(value, features[name]) for name, value in zip(columns, values, strict=True)}

    yield from _numbered(rows(), spec, "cannot be read", "Load it again")


def with_names(value: Any, feature: Any) -> Any:
    """Return a value with the names of class labels, also in lists, in place of their numbers; -1, none, is None.

    `feature` describes the column as `datasets.Features.to_dict` does; None: nothing is known of it.
    """
    if isinstance(feature, list):
        feature = {"feature": feature[0]}
    if not isinstance(feature, dict):
        return value
    if isinstance(value, list):
        return [with_names(item, feature.get("feature")) for item in value]
    names = feature.get("names")
    if not isinstance(names, list) or not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def _features_of(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return what a .parquet file that `datasets` wrote says of its columns."""
    try:
        return dict(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def _numbered(rows: Iterable[Record], name: str, problem: str, fix: str) -> Iterator[tuple[str, Record]]:
    """Number rows from 1, and say where a library cannot read on."""
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield f"{name}, row {number}", row
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: {problem} after row {number} ({_one_line(error)}). {fix}") from error


def _one_line(error: BaseException) -> str:
    told = [str(one) for one in (error, error.__cause__) if one is not None]
    return " ".join(" ".join(told).split())[:500]
