"""In everything that is read from JSON, `null` means that the field is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def without_nulls(told: Any) -> Any:
    """Plain data without the fields that are null, at any depth; items of lists stay."""
    if isinstance(told, Mapping):
        return {name: without_nulls(value) for name, value in told.items() if value is not None}
    return [without_nulls(value) for value in told] if isinstance(told, list) else told


def nulls_for_nan(figures: Any) -> Any:
    """Plain data with null for numbers that are not finite, which JSON has not, at any depth."""
    if isinstance(figures, Mapping):
        return {name: nulls_for_nan(value) for name, value in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [nulls_for_nan(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures
