"""Edits of latents, `z -> z'`, their strengths, schedules and masks, and the change they make to a site:

x' = x + M · s(t) · (dec(z') - dec(z)),   dec(z') - dec(z) = Σ_j (z'_j - z_j) d_j   over the edited j.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from .context import BRANCHES, DenoisingContext
from .errors import InputError
from .rules import Rule
from .saes import LatentStatistics, SparseAutoencoder
from .saes.statistics import UNITS
from .strengths import Grid, Strength, checked_strength, strength_now


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
    when: Rule | None = None

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.mode]

    def acts_on(self, branch: str) -> bool:
        """Whether the rows of `branch` are edited; `both` is cond and uncond."""
        return branch == self.branch or (self.branch == "both" and branch in BRANCHES)

    def in_window(self, progress: float) -> bool:
        """Whether `start <= progress < stop`; a window that ends at 1 includes it."""
        return self.start <= progress and (progress < self.stop or self.stop == 1)

    def chosen_images(self, context: DenoisingContext) -> torch.Tensor | None:
        """`(images,)` bool: the images that its rule lets it act on, none before that is decided; `None` for all."""
        if self.when is None:
            return None
        return context.decisions.get(self.when, torch.zeros(context.images, dtype=torch.bool))

    def strengths_at(
        self, context: DenoisingContext, statistics: LatentStatistics | None, grid: Grid
    ) -> torch.Tensor | None:
        """`(1 or images, 1 or P, m)` now, in raw units, or `None` where the edit changes nothing."""
        columns = [strength_now(s, context, grid) for s in self.strengths]
        strengths = torch.stack(torch.broadcast_tensors(*columns), -1)
        if self.operation.identity is not None and bool((strengths == self.operation.identity).all()):
            return None
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
    when: Rule | None = None,
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
        tuple(sae.checked_feature(f) for f in features),
        tuple(checked_strength(f, s) for f, s in features.items()),
        mode,
        float(start),
        float(stop),
        branch,
        None if mask is None else as_mask(mask),
        unit,
        when,
    )


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
    """`z' - z` of the edited latents for rows `x (B, P, d)`, in a shape that broadcasts to `(B, P, m)`.

    `strengths` is `(1 or B, 1 or P, m)`.
    """
    strengths = strengths.to(x.device)
    if not edit.operation.needs_code:
        return strengths
    z = sae.encode_only(x, torch.tensor(edit.features, device=x.device))
    return edit.operation.apply(z, strengths) - z
