"""The cache of encoded examples: columns of numbers on disk, built once and whole.

A document of a corpus is an example with one column, its ids; a text with its label, a sentence and its translation
have several.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from leanbert.data.store.cache import made_once
from leanbert.data.store.checksums import digest_of
from leanbert.errors import UserError

FORMAT = 3
"""Part of the key: raise it when files or encoding change."""

FLUSH_VALUES = 1 << 20
"""Values of a column that wait in memory before they are written."""

Example = Mapping[str, Sequence[float]]
"""Values by column."""


@dataclass
class Notes:
    """What is known of the examples besides their numbers."""

    cut: int = 0
    """How many were longer than a row."""
    cut_words: int = 0
    """How many of their words were left out with it."""
    labels: list[str] = field(default_factory=list)
    """Names of the labels, by the numbers that stand for them in the cache."""


class Unfinished(dict[str, Sequence[float]]):
    """The first values of an example, which goes on with the next one: a long document is never whole in memory."""


@dataclass(frozen=True)
class ExampleCache:
    """Examples as columns: of each example, each column has a row of numbers of any length.

    `NAME.bin` holds the values of a column one after the other, `NAME.offsets.bin` the `count + 1` int64 places where
    examples begin, and the end; `NAME.counts.bin`, of columns of ids, int64 [V] how often each id occurs. Files are
    mapped for each read and let go after it, so that resident memory does not grow with what was read; the object
    itself pickles as a path and a few numbers. `dtypes` are those of the columns.
    """

    folder: Path
    count: int
    dtypes: dict[str, str]
    notes: Notes

    def values(self, column: str) -> np.ndarray:
        """Map the values of a column, read-only."""
        return _map(self.folder / f"{column}.bin", self.dtypes[column])

    def offsets(self, column: str) -> np.ndarray:
        """Map the places where the examples' values begin, and the end: int64 [count + 1], read-only."""
        return _map(self.folder / f"{column}.offsets.bin", "int64")

    def counts(self, column: str) -> np.ndarray:
        """Return how often each id occurs in a column of ids: int64 [V]."""
        return np.fromfile(self.folder / f"{column}.counts.bin", dtype=np.int64)

    def size(self, column: str) -> int:
        """Return how many values a column has."""
        return (self.folder / f"{column}.bin").stat().st_size // np.dtype(self.dtypes[column]).itemsize

    def lengths(self, columns: Sequence[str]) -> np.ndarray:
        """Return how many values each example has in some columns: int64 [count, columns]."""
        return np.stack([np.diff(self.offsets(column)) for column in columns], axis=1)

    def read(self, column: str, groups: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Return the values of the examples of each group (their numbers, int64) in a column."""
        values, offsets = self.values(column), self.offsets(column)
        return [[values[offsets[example] : offsets[example + 1]] for example in group] for group in groups]


def build_examples(
    key: Sequence[Any],
    dtypes: Mapping[str, str],
    vocabularies: Mapping[str, int],
    encode: Callable[[Notes], Iterable[Example]],
    cache_dir: Path,
    without_any: str,
) -> ExampleCache:
    """Return the cache of some examples, building it if it is not there.

    Another process that builds the same waits; one that was killed leaves nothing that is taken for whole.

    Args:
        key: What decides its contents: digest of the files, settings, tokenizer; values that JSON has.
        dtypes: Columns and their NumPy types.
        vocabularies: Columns of ids, which are counted, and how many different ids there may be.
        encode: Yields the examples, and has written all that is noted of them when it ends.
        cache_dir: Folder of all caches.
        without_any: The error if there is no example.

    Raises UserError: there is no example, the disk is full, or what `encode` raises.
    """
    folder = cache_dir / "examples" / digest_of([FORMAT, tokenizers.__version__, *key])

    def make(building: Path) -> dict[str, Any]:
        notes = Notes()
        count = _write(building, dtypes, vocabularies, encode(notes))
        if count == 0:
            raise UserError(without_any)
        return {"count": count, "dtypes": dict(dtypes), "facts": asdict(notes)}

    known = made_once(folder, make)
    return ExampleCache(folder, known["count"], known["dtypes"], Notes(**known["facts"]))


def _write(
    folder: Path, dtypes: Mapping[str, str], vocabularies: Mapping[str, int], examples: Iterable[Example]
) -> int:
    """Write the columns of all examples, and return how many examples there are."""
    count = 0
    with ExitStack() as stack:

        def opened(name: str, dtype: str) -> _NumberFile:
            return stack.enter_context(closing(_NumberFile(folder / f"{name}.bin", dtype, vocabularies.get(name, 0))))

        columns = {name: (opened(name, dtype), opened(f"{name}.offsets", "int64")) for name, dtype in dtypes.items()}
        for _, offsets in columns.values():
            offsets.add([0])
        for example in examples:
            finished = not isinstance(example, Unfinished)
            count += finished
            for name, (values, offsets) in columns.items():
                values.add(example[name])
                offsets.add([values.length] if finished else [])
    for name in vocabularies:
        (folder / f"{name}.counts.bin").write_bytes(columns[name][0].counts.data)
    return count


class _NumberFile:
    """A file of numbers, written some at a time; those below `vocab_size` are counted."""

    def __init__(self, path: Path, dtype: str, vocab_size: int = 0) -> None:
        self.dtype, self.length, self.counts = dtype, 0, np.zeros(vocab_size, dtype=np.int64)
        self._file, self._waiting = path.open("wb"), list[float]()

    def add(self, values: Sequence[float]) -> None:
        self._waiting.extend(values)
        self.length += len(values)
        if len(self._waiting) > FLUSH_VALUES:
            self._flush()

    def close(self) -> None:
        with self._file:
            self._flush()

    def _flush(self) -> None:
        values = np.asarray(self._waiting, dtype=self.dtype)
        self._file.write(values.data)
        if len(self.counts):
            self.counts += np.bincount(values, minlength=len(self.counts))
        self._waiting.clear()


def _map(path: Path, dtype: str) -> np.ndarray:
    """Map a file of numbers, read-only, until the array is let go."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    with path.open("rb") as handle:
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype=dtype)
