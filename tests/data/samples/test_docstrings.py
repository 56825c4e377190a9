from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from leanbert.data.samples.docstrings import (
    embedded_corpus,
    harvest,
    installed_libraries,
    prose_paragraphs,
    read_docstrings,
)

MODULE = '''
"""This module says four words at least."""
raise RuntimeError("never imported")

class Klass:
    """A class of its own kind here."""
    if True:
        def method(self):
            """Do what a method must do."""
            def inner():
                """Even inner functions are read too."""
    async def other(self):
        "Wait for the other side first."

add_docstr(thing, r"""
thing(input) -> Tensor

Computes something for {input} in place.
""".format(**common))
print("""this string is not documentation at all""")
'''

DOCSTRING = """Return the sum of all ``values`` given.

    Parameters
    ----------
    values : list of :class:`~torch.Tensor`
        The **values** to add up, see `the guide <https://x.org>`_.

    .. note::
        Large sums lose some low bits.

    .. code-block:: python

        total = add(values)

        more = add(total, and, other, words)

    Use it as in the example that follows::

        this is code that goes away entirely

    Then comes prose that stays in place.
    >>> add([1, 2])
    3

    ==== ====== =====
    1    2.0    3.0

    x = a + b * c - d / e ** (f + g) = 0

    :param values: the numbers that are added
"""

PROSE = [
    "Return the sum of all values given.",
    "values : list of torch.Tensor The values to add up, see the guide.",
    "Large sums lose some low bits.",
    "Use it as in the example that follows:",
    "Then comes prose that stays in place.",
    "values: the numbers that are added",
]


def test_prose_is_kept_and_furniture_goes() -> None:
    assert prose_paragraphs(DOCSTRING) == PROSE


def test_files_are_parsed_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(MODULE)
    assert read_docstrings(path) == [
        ["This module says four words at least."],
        ["A class of its own kind here."],
        ["Do what a method must do."],
        ["Even inner functions are read too."],
        ["Wait for the other side first."],
        ["Computes something for in place."],
    ]


@pytest.mark.parametrize("content", [b"def broken(", b"\x00", b"# coding: none-such\n", b"\xff\xfe"])
def test_files_that_do_not_parse_are_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.py").write_bytes(content)
    assert read_docstrings(tmp_path / "bad.py") == []
    assert read_docstrings(tmp_path / "absent.py") == []


def test_only_what_is_required_counts() -> None:
    libraries = installed_libraries()
    assert {"torch", "lightning", "numpy", "tokenizers", "sympy"} <= set(libraries)
    assert not {"leanbert", "pytest", "transformers", "datasets", "ruff"} & set(libraries)
    assert list(libraries) == sorted(libraries)


@pytest.mark.slow
def test_the_corpus_has_ten_megabytes_and_is_made_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.getbasetemp().parent / "embedded"  # harvesting takes 20 s: keep it between runs
    path = embedded_corpus(folder)
    text = path.read_text(encoding="utf-8")
    assert len(text) >= 10_000_000
    documents = text.rstrip("\n").split("\n\n")
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not [paragraph for paragraph in paragraphs if ">>>" in paragraph[:4]]
    monkeypatch.setattr(sys.modules[embedded_corpus.__module__], "harvest", None)
    assert embedded_corpus(folder) == path


def test_harvesting_is_deterministic() -> None:
    libraries: dict[str, metadata.Distribution] = {
        name: metadata.distribution(name) for name in ("tqdm", "filelock", "packaging")
    }
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(sys.modules[harvest.__module__], "_standard_files", list)
        first, second = harvest(libraries), harvest(libraries)
    assert first == second
    assert len(first) > 300


def test_paragraphs_with_control_characters_are_left_out():
    text = "A text that ends with zero bytes \x00 as C has it.\n\nA text of the usual kind is kept here."
    assert prose_paragraphs(text) == ["A text of the usual kind is kept here."]
