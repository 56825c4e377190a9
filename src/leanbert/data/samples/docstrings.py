"""A corpus that every machine has: the docstrings of Python and of the libraries that leanbert needs.

Files are parsed, never imported or executed. The text depends on the installed versions only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from leanbert.data.samples.docstring_text import prose_paragraphs
from leanbert.data.store.cache import made_once
from leanbert.data.workers import process_pool

FORMAT = 2
"""Part of the corpus' name: raise it when harvesting or cleaning change."""

FILE = "docstrings.txt"
PACKAGE = "leanbert"
STANDARD_LIBRARY = "python"
FILES_PER_TASK = 16

_TEST_FOLDERS = {"test", "tests", "testing", "_test", "idle_test", "site-packages", "dist-packages"}
_NEEDED_FOR_EXTRA = re.compile(r"\bextra\s*==")
_REQUIRED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def embedded_corpus(cache_dir: Path) -> Path:
    """Return the corpus as a text file, harvested if it is not in the cache.

    A document is a docstring, a line of it a paragraph; a blank line separates documents.
    """
    libraries = installed_libraries()
    folder = cache_dir / "corpora" / f"docstrings-{versions_key(libraries)}"

    def make(building: Path) -> None:
        text = "\n\n".join(harvest(libraries)) + "\n"
        (building / FILE).write_text(text, encoding="utf-8", newline="\n")

    made_once(folder, make)
    return folder / FILE


@cache
def installed_libraries() -> dict[str, metadata.Distribution]:
    """Return the distributions that leanbert requires, directly or not, without extras, by normalised name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [PACKAGE]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        required = [line for line in found[name].requires or [] if not _NEEDED_FOR_EXTRA.search(line)]
        waiting += [match.group() for line in required if (match := _REQUIRED_NAME.match(line))]
    found.pop(PACKAGE, None)
    return dict(sorted(found.items()))


def harvest(libraries: Mapping[str, metadata.Distribution]) -> list[str]:
    """Return the cleaned documents, library by library, without paragraphs that were there before."""
    seen: set[bytes] = set()

    def is_new(paragraph: str) -> bool:
        digest = hashlib.blake2b(paragraph.lower().encode(), digest_size=8).digest()
        new = digest not in seen
        seen.add(digest)
        return new

    documents = ("\n".join(filter(is_new, paragraphs)) for _, paragraphs in labelled_docstrings(libraries))
    return [document for document in documents if document]


def labelled_docstrings(libraries: Mapping[str, metadata.Distribution]) -> Iterator[tuple[str, list[str]]]:
    """Yield (library, paragraphs of prose) of each docstring, Python's own first, in the order of the files."""
    sources = {STANDARD_LIBRARY: _standard_files()}
    sources |= {name: _python_files(library) for name, library in libraries.items()}
    names = [name for name, paths in sources.items() for _ in paths]
    files = [path for paths in sources.values() for path in paths]
    with process_pool() as pool:
        found = pool.map(read_docstrings, files, chunksize=FILES_PER_TASK)
        bar = tqdm(found, total=len(files), desc="Docstrings", unit="file", disable=None, leave=False)
        for name, documents in zip(names, bar, strict=True):
            yield from ((name, paragraphs) for paragraphs in documents)


def versions_key(libraries: Mapping[str, metadata.Distribution]) -> str:
    """Return a name for what is harvested: it changes with the versions and with `FORMAT`."""
    versions = {name: library.version for name, library in libraries.items()}
    facts = json.dumps([FORMAT, platform.python_version(), versions])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def read_docstrings(path: Path) -> list[list[str]]:
    """Return the docstrings of a Python file, each as a list of paragraphs of prose; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    cleaned = (prose_paragraphs(text) for text in _documentation(tree))
    return [paragraphs for paragraphs in cleaned if paragraphs]


def _documentation(node: ast.AST) -> Iterator[str]:
    """Yield docstrings in the order of the file, and those that calls such as `add_docstr` attach."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    for field in ("body", "orelse", "handlers", "finalbody"):
        for statement in getattr(node, field, ()):
            call = statement.value if isinstance(statement, ast.Expr) else None
            name = getattr(call.func, "id", getattr(call.func, "attr", "")) if isinstance(call, ast.Call) else ""
            if call is not None and re.search("docstr|newdoc", name):
                parts = (part.value for part in ast.walk(call) if isinstance(part, ast.Constant))
                yield from (part for part in parts if isinstance(part, str))
            elif isinstance(statement, ast.stmt | ast.excepthandler):
                yield from _documentation(statement)


def _standard_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return _sorted_sources(root, (path.relative_to(root) for path in root.rglob("*.py")))


def _python_files(library: metadata.Distribution) -> list[Path]:
    inside = (Path(str(file)) for file in library.files or [] if file.suffix == ".py")
    return _sorted_sources(Path(str(library.locate_file(""))), inside)


def _sorted_sources(root: Path, paths: Iterable[Path]) -> list[Path]:
    kept = (path for path in paths if _TEST_FOLDERS.isdisjoint(path.parts[:-1]))
    return [root / path for path in sorted(kept, key=Path.as_posix)]
