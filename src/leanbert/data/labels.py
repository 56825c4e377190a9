"""What the field of labels holds: one name, several, a yes or no for each label, or numbers."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from leanbert.errors import UserError
from leanbert.messages import say_once
from leanbert.models.stored import Problem

Form = Literal["names", "yes or no for each label"]
"""How several labels are written: those that are given, or of each label whether it is."""

FORMS = 'names, as ["a", "b"] or a,b; or of each label whether it is given, as [1.0, 0.0]'

LARGEST = float(np.finfo(np.float32).max)

_ITEM = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s,'"\[\](){}]+"""
_VALUE = r"""'[^']*'|"[^"]*"|-?[0-9]+\.?[0-9]*"""
_ARRAY = re.compile(  # as numpy and Python write several values, and a yes or no to three labels or more
    rf"\[\s*(?:{_VALUE})(?:[\s,]+(?:{_VALUE}))*\s*\]|\(\s*(?:{_VALUE})(?:[\s,]+(?:{_VALUE}))+\s*\)|[01](?:,[01]){{2,}}"
)
_YES_OR_NO = re.compile(r"[01](?:\s+[01])+")
_LIST = re.compile(rf"[\[({{]\s*(?:(?:{_ITEM})\s*(?:,\s*(?:{_ITEM})\s*)*,?\s*)?[\])}}]", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(\.[0-9]*)?(e[-+]?[0-9]{1,3})?", re.IGNORECASE)
_TRUTHS = {"true": True, "True": True, "false": False, "False": False}


class Numbering:
    """Numbers the names of labels in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def labels(self) -> list[str]:
        """Names of all labels so far."""
        return list(self._numbers)

    def read(self, where: str, value: object) -> list[str]:
        """Return the names of labels that are given."""
        assert isinstance(value, list)
        return value

    def targets(self, where: str, value: object) -> list[float]:
        """Return the numbers of labels that are given."""
        return [self._numbers.setdefault(name, len(self._numbers)) for name in self.read(where, value)]


class LabelReader(Numbering):
    """Numbers the labels of the examples of a part as they come, and says file and line of what is none.

    `field` is named in errors; `named` gives the name of a label, with where it stands, for its errors; `names` are
    those of the labels where each example says yes or no to all (None: their numbers); `values` yields the values of
    all examples: what [0, 1] means may depend on others.
    """

    def __init__(
        self, problem: Problem, field: str, named: Callable[[str, int | str], str], names: Sequence[str] | None,
        values: Callable[[], Iterator[object]],
    ) -> None:  # fmt: skip
        self.problem, self.field, self.named, self.names, self.values = problem, field, named, names, values
        super().__init__()
        self._length = 0
        self._form: Form | None = None
        self._first: tuple[str, object] | None = None

    @property
    def labels(self) -> list[str]:
        """Names of all labels so far; of numbers the field's, as often as an example has some."""
        return [self.field] * self._length if self.problem == "regression" else super().labels

    def targets(self, where: str, value: object) -> list[float]:
        """Return the numbers of the labels of an example, or the numbers that are its labels."""
        return self._values(where, value) if self.problem == "regression" else super().targets(where, value)

    def read(self, where: str, value: object) -> list[str]:
        """Return the names of the labels of an example. Raises UserError, naming the `where`, if it has none."""
        return self._several(where, value) if self.problem == "multi" else [self._one(where, value)]

    def _one(self, where: str, value: object) -> str:
        listed = isinstance(value, list | dict) or (isinstance(value, str) and _is_array(value))
        if listed or value is None or not str(value).strip() or (isinstance(value, float) and not math.isfinite(value)):
            raise self._error(where, value, "no single label. Correct it, or set data.problem")
        first_where, first = self._first = self._first or (where, value)
        if isinstance(value, bool) != isinstance(first, bool):  # else true and 1 would be two labels
            raise self._error(where, value, f"where {first_where} has {first!r}. Write all in one form")
        # a table of numbers in which one was missing comes as 1.0, 2.0
        whole = int(value) if isinstance(value, float) and value.is_integer() else None
        name = self.named(where, str(value).strip() if whole is None else whole)
        other = name.removesuffix(".0") if name.endswith(".0") else f"{name}.0"
        if other in self._numbers and _NUMBER.fullmatch(name):  # of two tables, one had a missing number
            raise self._error(where, value, f'where others have "{other}". Write all in one form')
        return name

    def _several(self, where: str, value: object) -> list[str]:
        items = self._items(where, value)
        form = certain_form(items)
        others = (certain_form(self._items("", other)) for other in self.values())
        self._form = self._form or form or next(filter(None, others), None)
        if items and self._form is None:
            raise self._error(where, value, f"which may be two labels or a yes and a no. Write {FORMS}")
        if self._form == "names":
            if form not in (None, "names"):
                raise self._error(where, value, "a yes or no for each label, where others have names. Use one form")
            names = [self.named(where, item) for item in items]
            if len(set(names)) < len(names):
                raise self._error(where, value, "the same label twice. Correct it")
            return names
        return self._given(where, value, items) if self._form else []

    def _given(self, where: str, value: object, items: list[object]) -> list[str]:
        """Return the labels of which an example says that they are given."""
        names = self.names or [str(number) for number in range(len(items))]
        count = len(self._numbers) or len(names)
        if certain_form(items) == "names" or len(items) != count:
            raise self._error(where, value, f"where others say yes or no (1.0, 0.0) to {count} labels. Do the same")
        for name in names:  # also those that are never given
            self._numbers.setdefault(name, len(self._numbers))
        return [name for name, item in zip(names, items, strict=True) if _said(item)]

    def _items(self, where: str, value: object) -> list[Any]:
        found = parse_list(value) if isinstance(value, str) else value
        if found is None and isinstance(value, str) and not _looks_like_list(value) and not _YES_OR_NO.fullmatch(value):
            found = [_bare(item) for item in map(str.strip, value.split(",")) if item]
            if len(found) == 1 and re.search("[|;]", value):
                say_once(f'field "{self.field}": labels are divided by commas; what has | or ; in it is one label')
        items = found if isinstance(found, list) else [found]
        plain = all(isinstance(item, str | int | float) for item in items)
        if not plain or any(isinstance(item, float) and item not in (0.0, 1.0) for item in items):
            raise self._error(where, value, f"no list of labels. Write {FORMS}")
        return [item.strip() if isinstance(item, str) else item for item in items if item != ""]

    def _values(self, where: str, value: object) -> list[float]:
        items = parse_list(value) if isinstance(value, str) else value
        items = [value] if items is None else items if isinstance(items, list) else [items]
        found = [finite(item) for item in items]
        if None in found or not found:
            wrong = items[found.index(None)] if found else value
            raise UserError(
                f'{where}: "{wrong}" is no finite number of 32 bits (field "{self.field}"). '
                "Correct it, or set data.problem"
            )
        self._length = self._length or len(found)
        if len(found) != self._length:
            raise self._error(where, value, f"{len(found)} numbers, where others have {self._length}. Give as many")
        return found  # type: ignore[return-value]

    def _error(self, where: str, value: object, problem: str) -> UserError:
        return UserError(f'{where}: field "{self.field}" is {repr(value)[:80]}, {problem}')


def certain_form(items: Sequence[object]) -> Form | None:
    """Return what a list of labels can only mean; None: [], [0, 1] and [1, 0] may be of both forms.

    Whole numbers are labels' numbers, which occur once; decimals and truth values say yes or no.
    Where there are several, texts are read for the numbers that they are.
    """
    items = [_said(item) for item in items] if len(items) > 1 else items
    if any(isinstance(item, bool | float) for item in items):
        return "yes or no for each label"
    if not items or any(item not in (0, 1) for item in items):
        return "names" if items else None
    if len(set(items)) < len(items):
        return "yes or no for each label"
    return "names" if len(items) == 1 else None


def finite(value: object) -> float | None:
    """Return a number that float32 holds; None if the value is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "_" in str(value)[:400]:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= LARGEST else None  # not a number is not less either


def parse_list(text: str) -> list[object] | None:
    """Return the items of a list that was written as text, as pandas does with Python's; None if it is no list.

    Items are quoted texts, numbers and truth values, with commas between them: nothing else is read, nothing evaluated.
    """
    text = text.strip()
    if not _looks_like_list(text) or _LIST.fullmatch(text) is None:
        return None
    items: list[object] = []
    for item in re.findall(_ITEM, text[1:-1], re.DOTALL):
        quoted = item[0] in "'\""
        try:
            items.append(ast.literal_eval(item) if quoted else _bare(item))
        except (SyntaxError, ValueError):  # an escape that does not exist
            return None
        if isinstance(items[-1], str) and not quoted:
            return None
    return items


def _is_array(text: str) -> bool:
    return parse_list(text) is not None or _ARRAY.fullmatch(text.strip()) is not None


def _said(item: object) -> Any:
    """Return the yes or no, or the number, that a text is; what is none stays as it is."""
    value = _bare(item) if isinstance(item, str) else item
    return value if value in (0, 1) else item


def _looks_like_list(text: str) -> bool:
    text = text.strip()
    return text[:1] == "[" or (text[:1] in ("(", "{") and text[-1:] in (")", "}") and ("'" in text or '"' in text))


def _bare(text: str) -> int | float | bool | str:
    """Return the number or truth value that is written so, or the text itself."""
    if text in _TRUTHS:
        return _TRUTHS[text]
    match = _NUMBER.fullmatch(text)
    if match is None:
        return text
    return float(text) if match[1] or match[2] else int(text)
