"""The example cache: encoded examples of a task as columns of numbers on disk, built once and whole.

What a token cache is to running text, this is to examples that belong together: a text and its label, the words of a
sentence and their roles, a sentence and its translation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from leanbert.data.store.cache import made_once
from leanbert.data.store.checksums import digest_of
from leanbert.data.store.token_cache import map_file
from leanbert.errors import UserError

FORMAT = 2
"""Part of the key: raise it when files or encoding change."""

FLUSH_VALUES = 1 << 20
"""Values of a column that wait in memory before they are written."""

Example = Mapping[str, Sequence[float]]
"""Values by column."""


@dataclass(frozen=True)
class ExampleCache:
    """Examples as columns: of each example, each column has a row of numbers of any length.

    `NAME.bin` holds the values of a column one after the other, `NAME.offsets.bin` the `count + 1` int64 places where
    examples begin, and the end. Files are mapped for each read and let go after it. `dtypes` are those of the columns;
    `facts` is what the builder wanted to keep beside (such as the labels), as JSON has it.
    """

    folder: Path
    count: int
    dtypes: dict[str, str]
    facts: dict[str, Any]

    def values(self, column: str) -> np.ndarray:
        """Map the values of a column, read-only."""
        return map_file(self.folder / f"{column}.bin", self.dtypes[column])

    def offsets(self, column: str) -> np.ndarray:
        """Map the places where the examples' values begin, and the end: int64 [count + 1], read-only."""
        return map_file(self.folder / f"{column}.offsets.bin", "int64")

    def lengths(self, column: str) -> np.ndarray:
        """Return how many values each example has in a column: int64 [count]."""
        return np.diff(self.offsets(column))

    def all_lengths(self, columns: Sequence[str]) -> np.ndarray:
        """Return the lengths in several columns side by side: int64 [count, columns]."""
        return np.stack([self.lengths(column) for column in columns], axis=1)

    def read(self, column: str, examples: np.ndarray) -> list[np.ndarray]:
        """Return the values of each of `examples` (their numbers, int64) in a column."""
        values, offsets = self.values(column), self.offsets(column)
        return [values[offsets[example] : offsets[example + 1]] for example in examples]


def build_examples(
    key: Sequence[Any],
    dtypes: Mapping[str, str],
    encode: Callable[[dict[str, Any]], Iterable[Example]],
    cache_dir: Path,
    setting: str,
) -> ExampleCache:
    """Return the cache of some examples, building it if it is not there.

    Args:
        key: What decides its contents: digest of the files, settings, tokenizer; values that JSON has.
        dtypes: Columns and their NumPy types.
        encode: Yields the examples; what it puts into the dictionary it is given is kept as the cache's `facts`.
        cache_dir: Folder of all caches.
        setting: Named where there is no example.

    Raises:
        UserError: There is no example, the disk is full, or what `encode` raises.

    """
    folder = cache_dir / "examples" / digest_of([FORMAT, tokenizers.__version__, *key])

    def make(building: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        count = _write(building, dtypes, encode(facts))
        if count == 0:
            raise UserError(f"{setting}: there is no example in it. Give files with examples")
        return {"count": count, "dtypes": dict(dtypes), "facts": facts}

    return ExampleCache(folder, **made_once(folder, make))


def _write(folder: Path, dtypes: Mapping[str, str], examples: Iterable[Example]) -> int:
    waiting: dict[str, list[float]] = {name: [] for name in dtypes}
    offsets: dict[str, list[int]] = {name: [0] for name in dtypes}

    def flush(name: str) -> None:
        with (folder / f"{name}.bin").open("ab") as file:
            file.write(np.asarray(waiting[name], dtype=dtypes[name]).data)
        waiting[name].clear()

    count = 0
    for count, example in enumerate(examples, start=1):  # noqa: B007
        for name in dtypes:
            values = example[name]
            waiting[name].extend(values)
            offsets[name].append(offsets[name][-1] + len(values))
            if len(waiting[name]) > FLUSH_VALUES:
                flush(name)
    for name in dtypes:
        flush(name)
        (folder / f"{name}.offsets.bin").write_bytes(np.asarray(offsets[name], dtype=np.int64).tobytes())
    return count
