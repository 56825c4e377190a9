import importlib
import math
import pkgutil
import typing

import pytest
from lightning.pytorch.callbacks import Callback

import leanbert
from leanbert.callbacks.loop.bad_steps import StopOnBadSteps
from leanbert.callbacks.reporting.plan import PlanReport
from leanbert.data.module import RowData
from leanbert.errors import UserError
from leanbert.optim.build import OptimizerConfig
from leanbert.optim.schedule import ScheduleConfig
from leanbert.ranges import COUNT, NOT_NEGATIVE, PART, POSITIVE, RATE, SHARE, WHOLE, Range, check_ranges
from leanbert.tasks.base import Task


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(), (-1e300, 0, 2), (), "a finite number"),
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
        RATE.check("a.betas", (0.9, 1.0))


def _classes_with_settings():
    """Yield all classes that users configure; others are made by command line and trainer."""
    for module in pkgutil.walk_packages(leanbert.__path__, "leanbert."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    kinds = (Callback, Task, RowData)
    found = {RowData} | {cls for kind in kinds for cls in _subclasses(kind) if cls.__module__.startswith("leanbert.")}
    yield from sorted(
        {*found, OptimizerConfig, ScheduleConfig} - {PlanReport, StopOnBadSteps}, key=lambda cls: cls.__name__
    )


def _subclasses(cls):
    return {inner for own in cls.__subclasses__() for inner in {own, *_subclasses(own)}}


def _numeric_settings():
    for cls in _classes_with_settings():
        for name, kind in typing.get_type_hints(cls.__init__).items():
            for number in (int, float):
                if number in (kind, *typing.get_args(kind)):
                    yield pytest.param(cls, name, number, id=f"{cls.__name__}.{name}")


@pytest.mark.parametrize(("cls", "name", "kind"), _numeric_settings())
def test_every_number_that_is_a_setting_has_a_range(cls, name, kind):
    for value in (math.nan, math.inf, -math.inf, True, *((1.5,) if kind is int else ())):
        with pytest.raises(UserError, match=rf"\.{name}: {value} is out of range\. Give"):
            cls(**{name: value})
