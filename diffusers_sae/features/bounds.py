"""Bounds between two activations."""

from __future__ import annotations

import torch


def midway(low: torch.Tensor, high: torch.Tensor) -> float:
    """A bound that parts two numbers of one dtype, `low <= bound < high`: halfway, or `low` if nothing is between."""
    middle = low / 2 + high / 2  # their sum might overflow
    return float(middle if low <= middle < high else low)
