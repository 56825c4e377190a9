"""Records of named fields, whatever file they are from: what is in a field, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from leanbert.errors import UserError

Record = dict[str, Any]

BY_DEFAULT = ("text", "label", "tokens", "labels", "predicate", "source", "target")
"""Fields that settings name unless told otherwise, `data.text_field` "text" and so on."""

_NONE = object()


def value_of(where: str, record: Record, field: str) -> Any:
    """Return what a field holds; `a.b` is the field b inside the field a, unless a name has the dot itself.

    Raises UserError: there is no such field. Names the `where` and the fields that are there.
    """
    value = _find(record, field)
    if value is _NONE:
        raise no_field(where, field, record)
    return value


def has_field(record: Record, field: str) -> bool:
    """Return whether a record has a field, which may be null."""
    return _find(record, field) is not _NONE


def text_of(where: str, record: Record, field: str) -> str:
    """Return the text in a field; null is none, "".

    Raises UserError: there is no such field, or something else in it, or text that cannot be written as UTF-8.
    """
    value = value_of(where, record, field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f'{where}: no text in field "{field}" ({type(value).__name__}). Set the name of the field that holds it'
        )
    return _encodable(where, value, field)


def texts_of(where: str, field: str, value: object) -> list[str]:
    """Return the value of a field, a list of texts. Raises UserError, naming the `where`, if it is none."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f'{where}: field "{field}" is no list of str. Set the name of the field that is')
    return [_encodable(where, item, field) for item in value]


def columns_of(where: str, names: Sequence[str], wanted: Sequence[str], optional: Sequence[str] = ()) -> list[str]:
    """Return the columns of a table that hold the fields, which may be inside them.

    Raises UserError: there is no column for a `wanted` field, or there are two of one name.
    """
    found = [name for name in names if any(_holds(name, field) for field in (*wanted, *optional))]
    for field in wanted:
        if not any(_holds(name, field) for name in found):
            raise no_field(where, field, names)
    refuse_doubles(where, found)
    return found


def refuse_doubles(where: str, names: Sequence[str]) -> None:
    """Raise UserError if two columns have one name."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f'{where}: {count} columns are called "{name}". Rename all but one')


def no_field(where: str, field: str, names: Iterable[str]) -> UserError:
    """Return the error about a field that is not there; a name by default is that of its setting."""
    there = ", ".join(repr(name) for name in names)
    there = f"{there[:200]}..." if len(there) > 200 else there or "nothing"
    setting = f"data.{field}_field" if field in BY_DEFAULT else "the name of the field (data.text_field, or its like)"
    return UserError(f'{where}: no field "{field}". Set {setting}; here is {there}')


def _holds(column: str, field: str) -> bool:
    return column == field or field.startswith(f"{column}.")


def _find(record: object, field: str) -> Any:
    if not isinstance(record, dict):
        return _NONE
    if field in record:
        return record[field]
    end = len(field)
    while (end := field.rfind(".", 0, end)) >= 0:
        if field[:end] in record and (value := _find(record[field[:end]], field[end + 1 :])) is not _NONE:
            return value
    return _NONE


def _encodable(where: str, text: str, field: str) -> str:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f'{where}: the text in field "{field}" holds half a character ({text[error.start]!a}), which no UTF-8 can '
            "spell. Write whole characters"
        ) from None
    return text
