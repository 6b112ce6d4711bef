"""How strongly an edit acts: the same always, or by image, progress, timestep and place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F

from .context import DenoisingContext
from .errors import InputError

Grid = Callable[[], tuple[int, int]]
"""Height and width of a site, looked up only where they matter."""


def _nearest(timesteps: Sequence[float], timestep: float) -> int:
    return min(range(len(timesteps)), key=lambda i: abs(timesteps[i] - timestep))


@dataclass(frozen=True)
class StrengthTable:
    """A strength for each of some timesteps; between them, the nearest one's."""

    timesteps: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, timestep: float) -> float:
        return self.values[_nearest(self.timesteps, timestep)]


@dataclass(frozen=True, eq=False)
class StrengthMap:
    """A strength for each of some timesteps and each place: `values (T, H, W)`, brought to the site's grid."""

    timesteps: tuple[float, ...]
    values: torch.Tensor

    def at(self, timestep: float, grid: tuple[int, int]) -> torch.Tensor:
        """`(P,)` for a grid of P places."""
        now = self.values[_nearest(self.timesteps, timestep)]
        if tuple(now.shape) != grid:
            now = F.interpolate(now[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
        return now.flatten()


Strength = Real | Sequence[float] | Callable[[float], float] | StrengthTable | StrengthMap
"""A number, a list with one number an image, a function of progress, or a table over timesteps (and places)."""


def strength_now(strength: Any, context: DenoisingContext, grid: Grid) -> torch.Tensor:
    """A checked strength at this moment, `(1 or images, 1 or P)`."""
    if isinstance(strength, StrengthMap):
        return strength.at(context.timestep, grid())[None]
    if isinstance(strength, StrengthTable):
        return torch.tensor([[strength.at(context.timestep)]])
    if callable(strength):
        value = float(strength(context.progress))
        if not math.isfinite(value):
            raise InputError(f"A strength is {value} at progress {context.progress:.3f}; return a finite number.")
        return torch.tensor([[value]])
    if isinstance(strength, Sequence):
        if len(strength) != context.images:
            raise InputError(
                f"A strength has {len(strength)} numbers and the batch {context.images} images; "
                "pass one number, or one for each image."
            )
        return torch.tensor([strength]).T
    return torch.tensor([[strength]])


def checked_strength(feature: int, strength: Any) -> Any:
    """The strength that `steer` was given for a feature, as a float, list, function or table; raises `InputError`."""
    if callable(strength):
        return strength
    if isinstance(strength, StrengthMap):
        numbers: Sequence[float] = strength.values.flatten().tolist()
        if strength.values.ndim != 3 or len(strength.values) != len(strength.timesteps):
            raise InputError(
                f"The StrengthMap of feature {feature} has {len(strength.timesteps)} timesteps and values of shape "
                f"{tuple(strength.values.shape)}; the values must be (timesteps, height, width)."
            )
    elif isinstance(strength, StrengthTable):
        numbers = strength.values
    elif isinstance(strength, Real):
        numbers = [float(strength)]
    else:
        try:
            numbers = strength = [float(v) for v in strength]
        except (TypeError, ValueError):
            raise InputError(
                f"The strength {strength!r} of feature {feature} is not a number, a list of numbers (one an image), "
                "a function of progress, a StrengthTable or a StrengthMap; pass one of those."
            ) from None
    if not numbers or not all(math.isfinite(v) for v in numbers):
        shown = "a map with numbers that are not" if isinstance(strength, StrengthMap) else strength
        raise InputError(f"The strength of feature {feature} is {shown}; every number in it must be finite.")
    return float(strength) if isinstance(strength, Real) else strength
