"""What some SAEs do to every row before they encode it, and undo after they decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..errors import InputError

EPSILON = 1e-5
"""Added to the standard deviation by which a row is divided, and not to the one that it is multiplied by again."""


class Normalized(NamedTuple):
    """Rows as the encoder takes them `(..., d)`, and `shift`, `scale (..., 1)`: a reconstruction `r` of them stands for
    `shift + scale r`."""

    rows: torch.Tensor
    shift: torch.Tensor
    scale: torch.Tensor


def _layer_norm(x: torch.Tensor) -> Normalized:
    """Mean 0 and standard deviation 1, with d - 1 in its denominator (Gao et al., 2024, appendix A; SAELens)."""
    mean = x.mean(-1, keepdim=True)
    deviation = x.std(-1, keepdim=True)
    return Normalized((x - mean) / (deviation + EPSILON), mean, deviation)


def _constant_norm(x: torch.Tensor) -> Normalized:
    """Norm `√d` (SAELens, `constant_norm_rescale`); rows of zeros stay as they are."""
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return Normalized(torch.where(scale > 0, x / scale, 0.0), torch.zeros_like(scale), scale)


NORMS: dict[str, Callable[[torch.Tensor], Normalized]] = {"layer_norm": _layer_norm, "constant_norm": _constant_norm}


def checked_norm(name: str | None) -> str | None:
    """`name`; raises `InputError` if it is no norm."""
    if name is not None and name not in NORMS:
        raise InputError(f"{name!r} is not an input_norm; choose one of {', '.join(NORMS)}, or leave it out.")
    return name
