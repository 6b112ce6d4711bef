"""Edits of latents, `z -> z'`, their strengths, schedules and masks. The change that they make to a site is

x' = x + M · s(t) · (dec(z') - dec(z)),   dec(z') - dec(z) = Σ_j (z'_j - z_j) d_j   over the edited j.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import InputError
from .families import GENERATORS
from .handover import Handover
from .masks import as_mask
from .rules import Rule
from .saes import LatentStatistics, SparseAutoencoder
from .saes.statistics import UNITS
from .sites import Place, Site
from .strengths import Strength, StrengthMap, StrengthTable, checked_strength


class Operation(NamedTuple):
    """How a mode changes a latent.

    `apply(z, strength)` gives z'; `needs_code` says whether z matters to z' - z; `identity` is the strength that
    changes nothing, if there is one. If it `overwrites`, `apply` says where latents fire instead, and those places get
    the rows of other places. Where the strength `is_factor`, it has no unit; elsewhere it is an activation.
    """

    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    needs_code: bool
    identity: float | None
    overwrites: bool = False
    is_factor: bool = False


OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda z, s: z + s, needs_code=False, identity=0.0),
    "set": Operation(lambda z, s: s.expand_as(z), needs_code=True, identity=None),
    "scale": Operation(lambda z, s: s * z, needs_code=True, identity=1.0, is_factor=True),
    "cap": Operation(torch.minimum, needs_code=True, identity=None),
    "ablate": Operation(lambda z, s: z - s * z, needs_code=True, identity=0.0, is_factor=True),
    "replace": Operation(torch.gt, needs_code=True, identity=None, overwrites=True),
}

BRANCH_WEIGHTS: dict[str, dict[str, float]] = {
    "cond": {"cond": 1.0},
    "uncond": {"uncond": 1.0},
    "both": {"cond": 1.0, "uncond": 1.0},
    "contrast": {"cond": 1.0, "uncond": -1.0},
}
"""Sign of the change on the rows of each guidance branch, by what `steer(branch=...)` says."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One operation on some latents of one SAE: when, where, and how strongly. Edits compare by identity."""

    features: tuple[int, ...]
    strengths: tuple[Any, ...]
    mode: str = "add"
    start: float = 0.0
    stop: float = 1.0
    branch: str = "cond"
    mask: torch.Tensor | None = None  # (1 or images, 1, H, W) in [0, 1]
    unit: str = "raw"
    when: Rule | None = None
    tokens: tuple[int, ...] = ()
    preserve_norm: bool = False

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.mode]

    @property
    def weights(self) -> dict[str, float]:
        """Sign of the change by guidance branch."""
        return BRANCH_WEIGHTS[self.branch]

    def in_window(self, step: int, count: int) -> bool:
        """Whether it acts at step `step` of a run of `count` steps; `start` and `stop` are fractions of the steps."""
        return math.floor(self.start * count + 1e-6) <= step < math.floor(self.stop * count + 1e-6)


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
    tokens: Sequence[int] | None = None,
    preserve_norm: bool = False,
    statistics: LatentStatistics | None = None,
) -> Edit:
    """Check what `steer` was given and make an `Edit` of it; raises `InputError`."""
    for name, value, known in (
        ("mode", mode, tuple(OPERATIONS)),
        ("branch", branch, tuple(BRANCH_WEIGHTS)),
        ("unit", unit, UNITS),
    ):
        if value not in known:
            raise InputError(f"{value!r} is not a {name}; choose one of {', '.join(known)}.")
    if not isinstance(features, Mapping) or not features:
        raise InputError(f"steer takes a dict {{feature: strength}} with at least one feature, not {features!r}.")
    if not (_is_number(start) and _is_number(stop) and 0 <= start < stop <= 1):
        raise InputError(
            f"start={start} and stop={stop} are no fractions of the steps; it needs 0 <= start < stop <= 1, "
            "where 0 is before the first step and 1 after the last."
        )
    if not isinstance(preserve_norm, (bool, np.bool_)):
        raise InputError(f"preserve_norm={preserve_norm!r:.80} is no choice; pass True or False.")
    if unit != "raw":
        if OPERATIONS[mode].is_factor:
            raise InputError(f"A strength of mode={mode!r} is a factor and has no unit; leave unit={unit!r} out.")
        if statistics is None:
            raise InputError(f"unit={unit!r} needs the SAE's statistics, and none lie beside it; use unit='raw'.")
        _check_unit(statistics, unit, [sae.checked_feature(f) for f in features])
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
        () if tokens is None else checked_tokens(tokens),
        bool(preserve_norm),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_unit(statistics: LatentStatistics, unit: str, features: list[int]) -> None:
    """Raise `InputError` unless strengths in multiples of the unit mean what they say; warn of where they are 0."""
    scales = torch.stack([statistics.at(float(t)).scale(unit) for t in statistics.timesteps])[:, features]
    silent: dict[int, list[float]] = {}
    for j, scale in zip(features, scales.T, strict=True):  # (T,)
        if not torch.isfinite(scale).all():
            raise InputError(f"The statistics of the SAE do not tell the {unit} of latent {j}; use another unit.")
        if (scale < 0).any():
            raise InputError(f"The {unit} of latent {j} is below 0 at some timesteps and no unit; use unit='raw'.")
        if not scale.any():
            raise InputError(
                f"Latent {j} was never active when the statistics were taken, so that its {unit} is 0; use unit='raw'."
            )
        if (scale == 0).any():
            silent[j] = statistics.timesteps[scale == 0].tolist()
    if silent:
        where = _some([f"latent {j} at {_some([f'{t:g}' for t in steps])}" for j, steps in silent.items()])
        warnings.warn(
            f"The {unit} of these latents is 0 at some timesteps, and so is every strength of unit={unit!r} there: "
            f"{where}; use unit='raw' for strengths that are not.",
            stacklevel=4,
        )


def _some(names: Sequence[str], most: int = 8) -> str:
    """Names in a sentence: the first ones, and how many more there are."""
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def check_fits(edit: Edit, site: Site, place: Place, watched: Site | None = None) -> None:
    """Raise `InputError` if an edit makes no sense at its site; `watched` is the site that its rule looks at."""
    if isinstance(place.module, Handover) and not set(edit.weights) <= set(place.module.branches):
        raise InputError(f"{site} are made for the branch cond alone here, and 0 for the other; pass branch='cond'.")
    if site.layout != "positions":
        _check_has_no_places(edit, site)
    if edit.when is not None and edit.when.at == "place" and watched is not None and watched.layout != "positions":
        raise InputError(f"A rule at places needs places, and the rows of {watched} are none; use at='image'.")
    if edit.tokens and not site.has_tokens:
        nowhere = site.layout == "vector" or site.has_one_row
        raise InputError(
            f"tokens are for sites of text, for w and for channels, and {site} is none; "
            + ("leave them out." if nowhere else "pass mask= to choose places of an image.")
        )
    if site.has_one_row and (edit.mask is not None or edit.operation.overwrites):
        raise InputError(f"{site} has one row an image and no places; leave mask= out, and choose another mode.")
    if site.has_tokens and edit.mask is not None:
        raise InputError(f"A mask is for sites of images, and {site} is none; pass tokens= to choose positions.")
    if not place.runs_once:
        return
    when = "as nothing is denoised" if place.root_name in GENERATORS else "before the denoising"
    if (edit.start, edit.stop) != (0.0, 1.0):
        raise InputError(f"{site} runs once, {when}, so that start and stop mean nothing; leave them out.")
    if any(callable(s) or isinstance(s, (StrengthTable, StrengthMap)) for s in edit.strengths):
        raise InputError(f"{site} runs once, {when}, so that a strength cannot follow it; pass numbers.")


def _check_has_no_places(edit: Edit, site: Site) -> None:
    """Raise `InputError` if an edit depends on places, for a site whose rows are whole maps."""
    for named, what in (
        (edit.mask is not None, "A mask"),
        (edit.operation.overwrites, f"mode={edit.mode!r}"),
        (any(isinstance(s, StrengthMap) for s in edit.strengths), "A StrengthMap"),
        (edit.when is not None and edit.when.at == "place", "A rule at places"),
    ):
        if named:
            raise InputError(
                f"{what} needs rows that are places, and those of {site} are whole maps; "
                "leave it out, or use an SAE of layout 'positions'."
            )


def checked_tokens(tokens: Any) -> tuple[int, ...]:
    """Positions that `steer` was given, each once; raises `InputError`."""
    if not isinstance(tokens, Sequence) or isinstance(tokens, str) or not tokens:
        raise InputError(f"tokens={tokens!r} is not a list of positions; pass one, such as [4, 5].")
    if not all(isinstance(t, (int, np.integer)) and not isinstance(t, bool) and t >= 0 for t in tokens):
        raise InputError(f"tokens={tokens!r} has entries that are no positions; pass whole numbers from 0 on.")
    return tuple(dict.fromkeys(int(t) for t in tokens))
