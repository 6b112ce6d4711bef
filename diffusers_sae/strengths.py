"""How strongly an edit acts: the same always, or by image, step, timestep and place."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

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
"""A number, a list with one number an image, a function of the fraction of the steps that are done, or a table over
timesteps (and places)."""


def strength_tables(strengths: Sequence[Any], context: Context) -> list[tuple[list[int], torch.Tensor]]:
    """Checked strengths at all timesteps of a run, grouped by the size of their maps.

    Returns:
        Groups of the strengths' indices, each with its table `(T, 1 or images, 1 or H, 1 or W, m)`. Maps of different
        sizes are in different groups, so that what one of them means on a grid does not depend on the others; what
        has no places is in the first.

    Raises:
        InputError: a function does not return a finite number, or lists have different lengths.
    """
    columns = [_column(strength, context) for strength in strengths]
    images = {c.shape[1] for c in columns} - {1}
    if len(images) > 1:
        raise InputError(f"Strengths of one edit have {images} numbers, one an image; give each as many.")
    sizes = list(dict.fromkeys(tuple(c.shape[2:]) for c in columns if c.shape[2:] != (1, 1))) or [(1, 1)]
    groups: list[list[int]] = [[] for _ in sizes]
    for i, column in enumerate(columns):
        size = tuple(column.shape[2:])
        groups[sizes.index(size) if size in sizes else 0].append(i)
    return [(group, _table([columns[i] for i in group], len(context.timesteps))) for group in groups]


def _table(columns: list[torch.Tensor], steps: int) -> torch.Tensor:
    stacked = torch.stack(torch.broadcast_tensors(*columns), -1)
    return stacked.expand(steps, *stacked.shape[1:])


def _column(strength: Any, context: Context) -> torch.Tensor:
    """One strength, `(1 or T, 1 or images, 1 or H, 1 or W)`."""
    if isinstance(strength, (StrengthMap, StrengthTable)):
        context.check_training_scale(f"A {type(strength).__name__}")
    if isinstance(strength, StrengthMap):
        return torch.stack([strength.at(t) for t in context.timesteps])[:, None]
    if isinstance(strength, StrengthTable):
        return torch.tensor([strength.at(t) for t in context.timesteps])[:, None, None, None]
    if callable(strength):
        by_step = {i: _finite_value(strength, i / context.step_count) for i in dict.fromkeys(context.steps)}
        return torch.tensor([by_step[i] for i in context.steps])[:, None, None, None]
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


def checked_strength(feature: int, strength: Any) -> Any:
    """The strength that `steer` was given for a feature, as a float, list, function or table; raises `InputError`."""
    if callable(strength):
        _check_takes_progress(feature, strength)
        return strength
    if isinstance(strength, StrengthMap):
        strength = _checked_map(feature, strength)
        numbers: Sequence[float] = strength.values.flatten().tolist()
    elif isinstance(strength, StrengthTable):
        strength = _checked_table(feature, strength)
        numbers = strength.values
    else:
        strength = _checked_numbers(feature, strength)
        numbers = [strength] if isinstance(strength, float) else strength
    if not numbers or not all(math.isfinite(v) for v in numbers):
        shown = "a map with numbers that are not" if isinstance(strength, StrengthMap) else strength
        raise InputError(f"The strength of feature {feature} is {shown}; every number in it must be finite.")
    return strength


def _checked_numbers(feature: int, strength: Any) -> float | list[float]:
    """A number, or the numbers of a list, as floats; raises `InputError`."""
    try:
        if isinstance(strength, (str, bytes, Mapping, Set)):
            raise TypeError("digits, keys and what has no order are no strengths of images")
        return float(strength) if isinstance(strength, Real) else [float(v) for v in strength]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        shown = " ".join(f"{strength!r:.80}".split())
        raise InputError(
            f"The strength {shown} of feature {feature} is not a number, a list of numbers (one an image), "
            "a function of progress, a StrengthTable or a StrengthMap; pass one of those."
        ) from None


def _checked_table(feature: int, strength: StrengthTable) -> StrengthTable:
    """A copy of a table for a plan; raises `InputError`."""
    try:
        timesteps, values = (tuple(float(v) for v in each) for each in (strength.timesteps, strength.values))
    except (TypeError, ValueError, OverflowError):
        timesteps, values = (), (0.0,)
    if len(timesteps) != len(values):
        raise InputError(
            f"The StrengthTable of feature {feature} is {strength!r:.120}; pass numbers, as many values as timesteps."
        )
    _check_timesteps(feature, timesteps)
    return StrengthTable(timesteps, values)


def _checked_map(feature: int, strength: StrengthMap) -> StrengthMap:
    """A copy of a map for a plan, in fp32 on the CPU, whatever the caller does with theirs; raises `InputError`."""
    try:
        timesteps = tuple(float(t) for t in strength.timesteps)
        if (values := torch.as_tensor(strength.values)).is_complex():
            raise TypeError("a strength is a real number")
        values = values.detach().to("cpu", torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(
            f"The StrengthMap of feature {feature} has values that are no tensor of real numbers, or timesteps that "
            "are no numbers; pass a tensor (timesteps, height, width), and as many numbers."
        ) from None
    if values.ndim != 3 or len(values) != len(timesteps):
        raise InputError(
            f"The StrengthMap of feature {feature} has {len(timesteps)} timesteps and values of shape "
            f"{tuple(values.shape)}; the values must be (timesteps, height, width)."
        )
    _check_timesteps(feature, timesteps)
    return StrengthMap(timesteps, values)


def _check_timesteps(feature: int, timesteps: Sequence[float]) -> None:
    if not all(math.isfinite(t) for t in timesteps):
        raise InputError(f"The strength of feature {feature} has timesteps that are not finite; pass finite ones.")
