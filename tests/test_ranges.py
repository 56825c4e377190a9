import math

import pytest

from leanbert.errors import UserError
from leanbert.ranges import COUNT, FINITE, NOT_NEGATIVE, PART, POSITIVE, RATE, SHARE, WHOLE, Range, check_ranges


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (FINITE, (-1e300, 0, 2), (), "a finite number"),
        (NOT_NEGATIVE, (0, 0.0, 1e30), (-1e-9,), "a finite number, 0 or more"),
        (POSITIVE, (1e-300, 5), (0, 0.0, -1), "a finite number above 0"),
        (SHARE, (0, 0.5, 1), (-0.1, 1.0001), "a finite number from 0 to 1"),
        (RATE, (0, 0.999), (1, 1.0), "a finite number from 0 to below 1"),
        (PART, (0.001, 0.999), (0, 1, 0.0, 1.0), "a finite number from above 0 to below 1"),
        (COUNT, (1, 10**400), (0, -1, 1.0, 1.5), "a whole number, 1 or more"),
        (WHOLE, (0,), (-1, 0.5), "a whole number, 0 or more"),
        (Range(below=0), (-1,), (0,), "a finite number below 0"),
        (Range(least=2, most=9, whole=True), (2, 9), (1, 10), "a whole number from 2 to 9"),
    ],
)
def test_ranges(allowed, inside, outside, text):
    assert all(value in allowed for value in inside)
    never = (math.nan, math.inf, -math.inf, True, False, "1", None, [1])
    assert not any(value in allowed for value in (*outside, *never))
    assert str(allowed) == text


def test_the_setting_and_its_range_are_named():
    check_ranges("model.optimizer", {"lr": 1.0, "eps": None, "name": "x"}, {"lr": POSITIVE, "eps": POSITIVE})
    with pytest.raises(
        UserError, match=r"^model\.optimizer\.lr: nan is out of range\. Give a finite number above 0\.$"
    ):
        check_ranges("model.optimizer", {"lr": math.nan}, {"lr": POSITIVE})
    with pytest.raises(UserError, match=r"^a\.betas: \(0\.9, 1\.0\) is out of range\. Give .* from 0 to below 1\.$"):
        check_ranges("a", {"betas": (0.9, 1.0)}, {"betas": RATE})
