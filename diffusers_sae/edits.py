"""Edits of latents, `z -> z'`, their strengths, schedules and masks, and the change they make to a site:

x' = x + M · s(t) · (dec(z') - dec(z)),   dec(z') - dec(z) = Σ_j (z'_j - z_j) d_j   over the edited j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .context import BRANCHES, DenoisingContext
from .errors import InputError
from .saes import LatentStatistics, SparseAutoencoder
from .saes.statistics import UNITS


class Operation(NamedTuple):
    """How a mode changes a latent.

    `apply(z, strength)` gives z'; `needs_code` says whether z matters to z' - z; `identity` is the strength that
    changes nothing, if there is one.
    """

    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    needs_code: bool
    identity: float | None


OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda z, s: z + s, needs_code=False, identity=0.0),
    "set": Operation(lambda z, s: s.expand_as(z), needs_code=True, identity=None),
    "scale": Operation(lambda z, s: s * z, needs_code=True, identity=1.0),
    "ablate": Operation(lambda z, s: z - s * z, needs_code=True, identity=0.0),
}


@dataclass(frozen=True)
class StrengthTable:
    """A strength for each of some timesteps; between them, the nearest one's."""

    timesteps: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, timestep: float) -> float:
        return self.values[min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))]


Strength = Real | Sequence[float] | Callable[[float], float] | StrengthTable
"""A number, a list with one number an image, a function of progress, or a table over timesteps."""


@dataclass(frozen=True)
class Edit:
    """One operation on some latents of one SAE: when, where, and how strongly."""

    features: tuple[int, ...]
    strengths: tuple[Any, ...]
    mode: str = "add"
    start: float = 0.0
    stop: float = 1.0
    branch: str = "cond"
    mask: torch.Tensor | None = None  # (1 or images, 1, H, W) in [0, 1]
    unit: str = "raw"

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.mode]

    def acts_on(self, branch: str) -> bool:
        """Whether the rows of `branch` are edited; `both` is cond and uncond."""
        return branch == self.branch or (self.branch == "both" and branch in BRANCHES)

    def in_window(self, progress: float) -> bool:
        """Whether `start <= progress < stop`; a window that ends at 1 includes it."""
        return self.start <= progress and (progress < self.stop or self.stop == 1)

    def strengths_at(self, context: DenoisingContext, statistics: LatentStatistics | None) -> torch.Tensor | None:
        """`(1 or images, m)` now, in raw units, or `None` where the edit changes nothing."""
        columns = [_numbers(s, context) for s in self.strengths]
        if self.operation.identity is not None and all(v == self.operation.identity for c in columns for v in c):
            return None
        images = max(len(c) for c in columns)
        strengths = torch.tensor([c * images if len(c) == 1 else c for c in columns]).T  # (images, m)
        if self.unit == "raw" or statistics is None:
            return strengths
        return strengths * statistics.at(context.timestep).scale(self.unit)[list(self.features)]

    def mask_at(self, grid: tuple[int, int], images: int) -> torch.Tensor:
        """The mask on a site's grid, `(1 or images, P, 1)`."""
        assert self.mask is not None
        n, _, height, width = self.mask.shape
        if n not in (1, images):
            raise InputError(f"The mask has {n} images and the batch {images}; pass one mask, or one for each image.")
        if abs(height * grid[1] - width * grid[0]) > max(height, width):
            raise InputError(
                f"The mask is {height} x {width}, which does not fit a site of {grid[0]} x {grid[1]}; "
                "make it as high and wide as the image, or smaller in the same ratio."
            )
        return F.interpolate(self.mask, grid, mode="area").flatten(2).transpose(1, 2)


def _numbers(strength: Any, context: DenoisingContext) -> list[float]:
    """A strength now, as one number or one for each image."""
    if isinstance(strength, StrengthTable):
        return [strength.at(context.timestep)]
    if callable(strength):
        value = float(strength(context.progress))
        if not math.isfinite(value):
            raise InputError(f"A strength is {value} at progress {context.progress:.3f}; return a finite number.")
        return [value]
    if isinstance(strength, Sequence):
        if len(strength) != context.images:
            raise InputError(
                f"A strength has {len(strength)} numbers and the batch {context.images} images; "
                "pass one number, or one for each image."
            )
        return list(strength)
    return [strength]


def make_edit(
    features: Mapping[int, Strength],
    sae: SparseAutoencoder,
    *,
    mode: str = "add",
    start: float = 0.0,
    stop: float = 1.0,
    branch: str = "cond",
    mask: Any = None,
    unit: str = "raw",
    statistics: LatentStatistics | None = None,
) -> Edit:
    """Check what `steer` was given and make an `Edit` of it; raises `InputError`."""
    for name, value, known in (
        ("mode", mode, tuple(OPERATIONS)),
        ("branch", branch, (*BRANCHES, "both")),
        ("unit", unit, UNITS),
    ):
        if value not in known:
            raise InputError(f"{value!r} is not a {name}; choose one of {', '.join(known)}.")
    if not isinstance(features, Mapping) or not features:
        raise InputError(f"steer takes a dict {{feature: strength}} with at least one feature, not {features!r}.")
    if not (0 <= start < stop <= 1):
        raise InputError(
            f"start={start} and stop={stop} are no window of progress; it needs 0 <= start < stop <= 1, "
            "where 0 is pure noise and 1 the finished image."
        )
    if unit != "raw" and statistics is None:
        raise InputError(f"unit={unit!r} needs the SAE's statistics, and none lie beside it; use unit='raw'.")
    return Edit(
        tuple(_checked_feature(f, sae) for f in features),
        tuple(_checked_strength(f, s) for f, s in features.items()),
        mode,
        float(start),
        float(stop),
        branch,
        None if mask is None else as_mask(mask),
        unit,
    )


def _checked_feature(feature: Any, sae: SparseAutoencoder) -> int:
    if not isinstance(feature, (int, np.integer)) or isinstance(feature, bool):
        raise InputError(f"{feature!r} is not a feature; pass its index, 0 to {sae.n_latents - 1}.")
    if not 0 <= feature < sae.n_latents:
        raise InputError(f"Feature {feature} is out of range; this SAE has the features 0 to {sae.n_latents - 1}.")
    return int(feature)


def _checked_strength(feature: int, strength: Any) -> Any:
    if callable(strength):
        return strength
    if isinstance(strength, StrengthTable):
        numbers: Sequence[Any] = strength.values
    elif isinstance(strength, Real):
        numbers = [strength]
    else:
        try:
            numbers = strength = [float(v) for v in strength]
        except (TypeError, ValueError):
            raise InputError(
                f"The strength {strength!r} of feature {feature} is not a number, a list of numbers (one an image), "
                "a function of progress or a StrengthTable; pass one of those."
            ) from None
    if not numbers or not all(math.isfinite(v) for v in numbers):
        raise InputError(f"The strength of feature {feature} is {strength}; every number in it must be finite.")
    return float(strength) if isinstance(strength, Real) else strength


def as_mask(mask: Any) -> torch.Tensor:
    """`(1 or images, 1, H, W)` in [0, 1] from a PIL image, an array or a tensor `(H, W)` or `(images, H, W)`.

    Images and integers count 0 to 255. Raises `InputError` for other shapes and values.
    """
    if hasattr(mask, "convert"):
        mask = np.array(mask.convert("L"))
    try:
        tensor = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"A mask of type {type(mask).__name__} was passed; pass a PIL image, array or tensor."
        ) from None
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if tensor.ndim not in (2, 3) or 0 in tensor.shape:
        raise InputError(f"The mask has shape {tuple(tensor.shape)}; it must be (H, W), or (images, H, W).")
    if not ((tensor >= 0) & (tensor <= 1)).all():
        raise InputError("The mask has values outside 0 to 1 (or NaN); scale it to that range, or pass uint8 0 to 255.")
    return tensor.reshape(-1, 1, *tensor.shape[-2:])


def code_change(edit: Edit, sae: SparseAutoencoder, x: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """`z' - z` of the edited latents for rows `x (B, P, d)`: `(B, P, m)`, or `(B, 1, m)` if it is the same everywhere.

    `strengths` is `(1 or B, m)`.
    """
    strengths = strengths[:, None].to(x.device)  # (B, 1, m)
    if not edit.operation.needs_code:
        return strengths
    z = sae.encode_only(x, torch.tensor(edit.features, device=x.device))
    return edit.operation.apply(z, strengths) - z
