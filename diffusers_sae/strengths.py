"""How strongly an edit acts: the same always, or by image, progress, timestep and place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F

from .context import Context
from .errors import InputError


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

    def at(self, timestep: float) -> torch.Tensor:
        """`(H, W)`."""
        return self.values[_nearest(self.timesteps, timestep)]


Strength = Real | Sequence[float] | Callable[[float], float] | StrengthTable | StrengthMap
"""A number, a list with one number an image, a function of progress, or a table over timesteps (and places)."""


def strength_table(strengths: Sequence[Any], context: Context) -> torch.Tensor:
    """Checked strengths at all timesteps of a run, `(T, 1 or images, 1 or H, 1 or W, m)`.

    Maps of different sizes are brought to the largest.
    """
    columns = [_column(strength, context) for strength in strengths]
    height, width = max(c.shape[2] for c in columns), max(c.shape[3] for c in columns)
    columns = [c if c.shape[2:] in ((1, 1), (height, width)) else _resized(c, (height, width)) for c in columns]
    images = {c.shape[1] for c in columns} - {1}
    if len(images) > 1:
        raise InputError(f"Strengths of one edit have {images} numbers, one an image; give each as many.")
    stacked = torch.stack(torch.broadcast_tensors(*columns), -1)
    return stacked.expand(len(context.timesteps), *stacked.shape[1:])


def _column(strength: Any, context: Context) -> torch.Tensor:
    """One strength, `(1 or T, 1 or images, 1 or H, 1 or W)`."""
    if isinstance(strength, StrengthMap):
        return torch.stack([strength.at(t) for t in context.timesteps])[:, None]
    if isinstance(strength, StrengthTable):
        return torch.tensor([strength.at(t) for t in context.timesteps])[:, None, None, None]
    if callable(strength):
        values = [_finite_value(strength, context.progress(t)) for t in context.timesteps]
        return torch.tensor(values)[:, None, None, None]
    if isinstance(strength, Sequence):
        return torch.tensor(strength)[None, :, None, None]
    return torch.tensor(float(strength)).reshape(1, 1, 1, 1)


def _finite_value(strength: Callable[[float], Any], progress: float) -> float:
    """What a strength function returns, as a float; what it raises itself is its author's and goes on."""
    value = strength(progress)
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        shown = " ".join(f"{value!r:.60}".split())
        raise InputError(f"A strength is {shown} at progress {progress:.3f}; return a finite number.")
    return number


def _check_takes_progress(feature: int, strength: Callable[..., Any]) -> None:
    """Raise `InputError` if a function cannot be called with the progress alone."""
    try:
        signature = inspect.signature(strength)
    except (TypeError, ValueError):  # some functions in C do not tell theirs
        return
    try:
        signature.bind(0.0)
    except TypeError:
        raise InputError(
            f"The strength of feature {feature} is a function of {signature}; it must take one argument, the progress."
        ) from None


def _resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def checked_strength(feature: int, strength: Any) -> Any:
    """The strength that `steer` was given for a feature, as a float, list, function or table; raises `InputError`."""
    if callable(strength):
        _check_takes_progress(feature, strength)
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
            if isinstance(strength, (str, bytes)):
                raise TypeError("its digits would be a strength each")
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
