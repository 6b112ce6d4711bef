"""In everything that is read from JSON, `null` means that the field is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def without_nulls(told: Any) -> Any:
    """Plain data without the fields that are null, at any depth; items of lists stay."""
    if isinstance(told, Mapping):
        return {name: without_nulls(value) for name, value in told.items() if value is not None}
    return [without_nulls(value) for value in told] if isinstance(told, list) else told
