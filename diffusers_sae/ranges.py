"""Ranges of numbers that settings may have, and the sentence about one that lies outside."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`, without the ends that are `open`.

    Args:
        whole: whether they are integers.
        optional: whether `None` is allowed, too.
        infinite: whether an infinite number is allowed, too.
    """

    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    whole: bool = False
    optional: bool = False
    infinite: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of them; neither a bool nor NaN is."""
        if value is None:
            return self.optional
        if not isinstance(value, numbers.Integral if self.whole else numbers.Real) or isinstance(value, bool):
            return False
        value = float(value)
        if math.isnan(value):
            return False
        if math.isinf(value):
            return self.infinite and value > self.low and self.high == math.inf
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.low > -math.inf and self.high < math.inf:
            ends = f" between {self.low:g} and {self.high:g}"
        elif self.low > -math.inf:
            ends = f" above {self.low:g}" if self.open else f" of at least {self.low:g}"
        else:
            ends = ""
        return kind + ends + (", or None" if self.optional else "")


def check_ranges(settings: Any, ranges: Mapping[str, Range]) -> None:
    """Raise `InputError` for the first attribute of `settings` that lies outside of its range."""
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if not allowed.holds(value):
            raise InputError(f"{name}={value!r} must be {allowed}.")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise `InputError` unless `value` is one of the names in `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}={value!r} is not a choice; choose from {', '.join(choices)}.")
