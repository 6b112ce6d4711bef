"""What rounding asks for: weights and rows in half precision, and rows that differ by rounding alone."""

from __future__ import annotations

import torch

NO_SPREAD = 1e-12
"""Share of the mean square of rows up to which the mean square distance from their mean is rounding."""


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself, or in fp32 if its dtype has fewer bits; every number stays the same."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
