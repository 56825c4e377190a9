"""The numbers that a setting takes: one check for all classes that have settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from leanbert.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers between bounds; `str` of it is what to give, such as `a whole number, 1 or more`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    """Bound that is not itself in the range."""
    below: float = math.inf
    """Bound that is not itself in the range."""
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        """Return whether `value` is such a number; True and False are none."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value  # a whole one may be too long for a float
        return -math.inf < number < math.inf and self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        """Return what to give."""
        kind = "a whole number" if self.whole else "a finite number"
        low = f"{self.least}" if self.least > -math.inf else f"above {self.above}" if self.above > -math.inf else ""
        high = f"{self.most}" if self.most < math.inf else f"below {self.below}" if self.below < math.inf else ""
        if low and high:
            return f"{kind} from {low} to {high}"
        if self.least > -math.inf:
            return f"{kind}, {low} or more"
        if self.most < math.inf:
            return f"{kind}, at most {high}"
        return f"{kind} {low}{high}".rstrip()

    def check(self, setting: str, value: Any) -> None:
        """Raise UserError, naming the `setting`, if its value is outside.

        Of a list or tuple each number is looked at; None, a setting that is not set, passes.
        """
        numbers: Iterable[Any] = value if isinstance(value, list | tuple) else (value,)
        if any(number is not None and number not in self for number in numbers):
            raise UserError(f"{setting}: {value} is out of range. Give {self}.")


NOT_NEGATIVE = Range(least=0)
POSITIVE = Range(above=0)
SHARE = Range(least=0, most=1)
RATE = Range(least=0, below=1)
"""A share of which all is senseless, such as dropout."""
PART = Range(above=0, below=1)
"""A share of which none is senseless too."""
COUNT = Range(least=1, whole=True)
WHOLE = Range(least=0, whole=True)
GLOBAL_SEED = Range(least=0, most=2**32 - 1, whole=True)
"""Of `seed_everything`: NumPy takes no more."""
SEED = Range(least=0, most=2**63 - 1, whole=True)


def check_ranges(of: str, settings: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Check the `settings`, values by name, that have a range; `of` is what they are of, such as `model.optimizer`."""
    for name, allowed in ranges.items():
        allowed.check(f"{of}.{name}", settings[name])
