from __future__ import annotations

import pytest

from leanbert.data.formats.fields import columns_of, has_field, text_of, texts_of, value_of
from leanbert.errors import UserError

RECORD = {"a": {"b": 1, "c.d": {"e": None}, "f": {"g": "deep"}}, "a.b": 2, "a.f": "flat", "text": "t", "none": None}


@pytest.mark.parametrize(
    ("field", "value"),
    [("a.b", 2), ("a.c.d.e", None), ("a.f.g", "deep"), ("a.f", "flat"), ("text", "t"), ("a.c.d", {"e": None})],
)
def test_a_field_inside_a_field_is_named_with_a_dot(field: str, value: object) -> None:
    assert value_of("x:1", RECORD, field) == value
    assert has_field(RECORD, field)


@pytest.mark.parametrize("field", ["b", "a.x", "text.x", "a.b.c", "", "a.", ".a"])
def test_what_is_not_there(field: str) -> None:
    assert not has_field(RECORD, field)
    with pytest.raises(UserError) as caught:
        value_of("x:1", RECORD, field)
    assert str(caught.value) == (
        f'x:1: no field "{field}". Set the name of the field (data.text_field, or its like); '
        "here is 'a', 'a.b', 'a.f', 'text', 'none'"
    )


@pytest.mark.parametrize("field", ["text", "label", "tokens", "labels", "predicate", "source", "target"])
def test_a_field_by_default_that_is_not_there_has_the_name_of_its_setting(field: str) -> None:
    with pytest.raises(UserError, match=rf'^x:1: no field "{field}"\. Set data\.{field}_field; here is \'a\'$'):
        value_of("x:1", {"a": 1}, field)


def test_texts() -> None:
    assert text_of("x:1", RECORD, "a.f.g") == "deep"
    assert text_of("x:1", RECORD, "none") == ""
    assert text_of("x:1", {"t": "\U0001f600\0\u2028"}, "t") == "\U0001f600\0\u2028"
    for value, name in ((3, "int"), (1.5, "float"), (True, "bool"), (["a"], "list"), ({"a": "b"}, "dict")):
        with pytest.raises(UserError, match=rf'^x:1: no text in field "t" \({name}\)\. Set the name of the field'):
            text_of("x:1", {"t": value}, "t")


def test_half_characters_are_refused() -> None:
    message = r'^x:1: the text in field "t" holds half a character \(\'\\ud83d\'\), which no UTF-8 can spell\.'
    with pytest.raises(UserError, match=message):
        text_of("x:1", {"t": "a \ud83d b"}, "t")
    with pytest.raises(UserError, match=message):
        texts_of("x:1", "t", ["a", "\ud83d"])


def test_lists() -> None:
    assert texts_of("x:1", "a.b", ["c", "d"]) == ["c", "d"]
    for value in (None, "c", ["c", 1], [None]):
        with pytest.raises(UserError, match=r'^x:1: field "t" is no list of str\.'):
            texts_of("x:1", "t", value)


def test_columns() -> None:
    names = ["id", "a", "a.b", "in", "in"]
    assert columns_of("x", names, ["a.b"], ["id", "other"]) == ["id", "a", "a.b"]
    with pytest.raises(UserError, match=r'^x: 2 columns are called "in"\. Rename all but one$'):
        columns_of("x", names, ["in.c"])
    with pytest.raises(UserError, match=r'^x: no field "b"\.'):
        columns_of("x", names, ["b"])
