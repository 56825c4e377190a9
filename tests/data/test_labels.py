"""What a field of labels may hold, and what is an error that names its place."""

import pytest

from leanbert.data.labels import LabelReader, parse_list
from leanbert.errors import UserError
from leanbert.messages import say_once


def reader(problem, *values, names=None):
    return LabelReader(problem, "label", lambda place, label: str(label), names, lambda: iter(values))


def read(problem, *values, **more):
    """Return the names of the labels of each value, as those of one part."""
    own = reader(problem, *values, **more)
    return [own.read(f"f:{number}", value) for number, value in enumerate(values, start=1)]


def test_single_labels_are_names_and_whole_numbers_are_written_without_decimals():
    assert read("single", "a", " a", 1, "1", 1.0, 2.5) == [["a"], ["a"], ["1"], ["1"], ["1"], ["2.5"]]
    assert read("single", True, False) == [["True"], ["False"]]
    assert read("single", "[CLS]", "a, b") == [["[CLS]"], ["a, b"]]


@pytest.mark.parametrize(
    "value",
    [
        ["a"], {"a": 1}, "['a', 'b']", "[1.0, 0.0]", "[1 0 1]", "[1. 0. 1.]", "['a' 'b']", "(1, 0)", "1,0,0", "", " ",
        float("nan"), float("inf"),
    ],
)  # fmt: skip
def test_what_is_no_single_label_is_an_error(value):
    with pytest.raises(UserError, match=r'^f:1: field "label" is .*, no single label'):
        read("single", value)


@pytest.mark.parametrize(("first", "second"), [(1, True), ("1", False), (True, 1.0)])
def test_truth_values_among_other_labels_are_an_error(first, second):
    with pytest.raises(UserError, match=rf'^f:2: field "label" is {second}, where f:1 has {first!r}'):
        read("single", first, second)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([["a", "b"], [], ["b "]], [["a", "b"], [], ["b"]]),
        (["a,b", "", "b, a", "c"], [["a", "b"], [], ["b", "a"], ["c"]]),
        (
            ["['a', 'b']", "[]", '["it\'s, b"]', "('a',)", "{'a', 'b'}"],
            [["a", "b"], [], ["it's, b"], ["a"], ["a", "b"]],
        ),
        ([[3, 17], [0], [0, 1]], [["3", "17"], ["0"], ["0", "1"]]),
        ([[0, 1], [3, 17]], [["0", "1"], ["3", "17"]]),  # what comes later decides
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], [["0"], [], ["0", "1"]]),
        ([[True, False], [False, True]], [["0"], ["1"]]),
        ([[0, 1], [1, 1]], [["1"], ["0", "1"]]),
        (["[0, 1, 0]", "[1. , 0., 1.]", "1,0,0"], [["1"], ["0", "2"], ["0"]]),
        (["007,012"], [["007", "012"]]),
        ([["1", "0", "1"], ["0", "1", "0"]], [["0", "2"], ["1"]]),
        ([["3", "17"], ["0", "1"]], [["3", "17"], ["0", "1"]]),
        (["(other)"], [["(other)"]]),
    ],
)
def test_several_labels(values, labels):
    assert read("multi", *values) == labels


def test_labels_that_are_never_given_count():
    own = reader("multi", names=["rude", "short", "funny"])
    assert own.targets("f:1", [0.0, 0.0, 1.0]) == [2]
    assert own.labels == ["rude", "short", "funny"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0, 1], [1, 0]], r"f:1: .* is \[0, 1\], which may be two labels or a yes and a no"),
        ([[1.0, 0.5]], r"f:1: .* is \[1.0, 0.5\], no list of labels"),
        ([[float("nan")]], r"f:1: .*no list of labels"),
        ([["a", None]], r"f:1: .*no list of labels"),
        ([[["a"]]], r"f:1: .*no list of labels"),
        ([{"a": 1}], r"f:1: .*no list of labels"),
        (["[rude, short]"], r"f:1: .* is '\[rude, short\]', no list of labels"),
        (["['a' 'b']"], r"f:1: .*no list of labels"),
        (["[1. 0. 1.]"], r"f:1: .*no list of labels"),
        (["1 0 1"], r"f:1: .*no list of labels"),
        ([["a", "b", "a "]], r"f:1: .*, the same label twice"),
        (["{'a': 1}"], r"f:1: .*no list of labels"),
        ([["a"], [1.0, 0.0]], r"f:2: .*a yes or no for each label, where others have names"),
        ([[1.0, 0.0], ["a"]], r"f:2: .*where others say yes or no \(1.0, 0.0\) to 2 labels"),
        ([[1.0, 0.0], [1.0]], r"f:2: .*where others say yes or no \(1.0, 0.0\) to 2 labels"),
    ],
)
def test_what_is_no_list_of_labels_is_an_error(values, message):
    with pytest.raises(UserError, match="^" + message):
        read("multi", *values)


def test_a_number_with_and_without_decimals_would_be_two_labels():
    own = reader("single")
    assert own.targets("a.csv:2", "1") == [0]
    with pytest.raises(UserError, match=r"^b\.csv:2: field .* is '1\.0', where others have \"1\"\. Write all in one"):
        own.targets("b.csv:2", "1.0")
    assert [own.targets("a.csv:3", name) for name in ("v1", "v1.0", "2.1", "2.1.0")] == [[1], [2], [3], [4]]


def test_other_marks_than_commas_between_labels_are_pointed_out(capsys):
    say_once.cache_clear()
    assert read("multi", "Action|Comedy", "a") == [["Action|Comedy"], ["a"]]
    assert "labels are divided by commas" in capsys.readouterr().err


def test_numbers():
    own = reader("regression")
    values = [2, "1e3", "-0.5", " 3 ", 3.4028234e38]
    assert [own.targets("f:1", value) for value in values] == [[2.0], [1000.0], [-0.5], [3.0], [3.4028234e38]]
    own = reader("regression")
    assert [own.targets("f:1", value) for value in ([1, 2.5], "[3, 4.0]")] == [[1.0, 2.5], [3.0, 4.0]]
    assert own.labels == ["label", "label"]


@pytest.mark.parametrize(
    "value",
    ["inf", "NaN", float("nan"), "1e39", 1e39, 10**400, -1e39, True, "1_000", "1,5", "", None, [1, None], [], {}],
)
def test_what_is_no_finite_number_is_an_error(value):
    with pytest.raises(UserError, match=r'^f:1: ".*" is no finite number of 32 bits \(field "label"\)'):
        reader("regression").targets("f:1", value)


def test_all_examples_have_as_many_numbers():
    own = reader("regression")
    own.targets("f:1", [1, 2])
    with pytest.raises(UserError, match=r"f:2: .* is 1.0, 1 numbers, where others have 2"):
        own.targets("f:2", 1.0)


@pytest.mark.parametrize("text", ["[__import__('os')]", "[1 + 1]", "['a', b]", "['\\N{x}']", "[" * 5000, "['a'"])
def test_nothing_but_texts_and_numbers_is_read(text):
    assert parse_list(text) is None
