"""Edits made ready for one run: all that does not depend on activations, as tensors on the run's device.

Nothing here is read back from the device, so that the denoising loop never waits, and `torch.compile` sees tensors
where users change numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from .context import Context
from .edits import Edit
from .errors import InputError
from .resizing import average_areas, resize_map
from .rules import Decision
from .saes import LatentStatistics, SparseAutoencoder
from .strengths import strength_tables

TABLE_LIMIT = 2**24
"""Numbers in a table of changes that is computed before a run, at most: 64 MiB of them."""


@dataclass(eq=False)
class PreparedEdit:
    """One edit for one run.

    Args:
        edit: what was asked for.
        strengths: in raw units, for the T timesteps that the run passes, a table
            `(T, 1 or images, 1 or H, 1 or W, m)` for each size of their maps; together they are those of the features,
            in order.
        inside: `(T,)`, 1 for timesteps inside the window.
        acts: for each of the T timesteps, whether it is inside and any strength is not the identity.
        features: `(m,)`, the edit's, sorted by the sizes of their strengths.
        directions: `(m, d)`, their decoder rows.
        mask: `(1 or images, 1, H, W)` in [0, 1].
        decision: of the edit's rule.
        row_scale: see `SparseAutoencoder.row_scale`.
        table: of an edit that adds the same everywhere in an image, what it adds inside the window,
            `(T, 1 or images, d)`.
        is_shift: whether that is all it does, so that its change depends on step, image and branch alone.
    """

    edit: Edit
    strengths: tuple[torch.Tensor, ...]
    inside: torch.Tensor
    acts: tuple[bool, ...]
    features: torch.Tensor
    directions: torch.Tensor
    mask: torch.Tensor | None
    decision: Decision | None
    row_scale: Callable[[torch.Tensor], torch.Tensor | None]
    table: torch.Tensor | None = None
    is_shift: bool = False
    _kept: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    @property
    def needs_grid(self) -> bool:
        """Whether it depends on where a place lies in the image."""
        at_places = self.decision is not None and self.decision.rule.at == "place"
        spread = any(table.shape[2:4] != (1, 1) for table in self.strengths)
        return self.mask is not None or spread or at_places or self.edit.operation.overwrites

    @property
    def windowed(self) -> bool:
        """Whether the edit has a window of steps; asked of the edit, since its strengths must not matter here."""
        return (self.edit.start, self.edit.stop) != (0.0, 1.0)

    def keeps_norm(self, branch: str, context: Context) -> bool:
        """Whether rows of the branch that it reaches now keep their norm, whatever its strengths are."""
        known = context.host_step
        inside = known is None or self.edit.in_window(context.steps[known], context.step_count)
        return self.edit.preserve_norm and inside and self.edit.weights.get(branch, 0.0) != 0.0

    def needs(self, branch: str, context: Context) -> bool:
        """Whether it may change rows of the branch now."""
        known = context.host_step
        return self.edit.weights.get(branch, 0.0) != 0.0 and (known is None or self.acts[known])

    def change(
        self, x: torch.Tensor, z: torch.Tensor | None, branch: str, context: Context, grid: tuple[int, int] | None
    ) -> torch.Tensor:
        """`M · s(t) · (dec(z') - dec(z))` for rows `x (..., images, P, d)` of a branch, in fp32; broadcasts to `x`.

        `z (..., images, P, m)` is their code, if the operation needs it; `grid` is height and width of the P places,
        where they have any. Branches of equal weight may come together, in front of the images.
        """
        delta = self._unmasked(x, z, context, grid)
        weight = self.edit.weights[branch]
        delta = delta if weight == 1 else weight * delta
        reach = self.reach(x, context, grid)
        return delta if reach is None else delta * reach

    def reach(self, x: torch.Tensor, context: Context, grid: tuple[int, int] | None) -> torch.Tensor | None:
        """M: how much of the change each row gets, in [0, 1], `(1 or images, 1 or P, 1)`; `None` for all of it."""
        factors = []
        if self.windowed and context.host_step is None:  # with the step known, only edits that act come here
            factors.append(self.inside.index_select(0, context.step.reshape(1)))
        if self.mask is not None:
            factors.append(self._mask_at(grid, context.images))
        if self.edit.tokens:
            factors.append(self._chosen_tokens(x))
        if self.decision is not None:
            factors.append(self.decision.weights(x, grid))
        return functools.reduce(torch.mul, factors) if factors else None

    def _unmasked(
        self, x: torch.Tensor, z: torch.Tensor | None, context: Context, grid: tuple[int, int] | None
    ) -> torch.Tensor:
        """`dec(z') - dec(z)`."""
        if self.edit.operation.overwrites:
            assert grid is not None and z is not None
            return self._overwritten(x, z, self._strengths_now(context, grid), grid)
        if self.table is not None:
            check_images(self.table.shape[1], context)
            change = context.at_step(self.table)[:, None]
        else:
            strengths = self._strengths_now(context, grid)
            change = (strengths if z is None else self.edit.operation.apply(z, strengths) - z) @ self.directions
        scale = self.row_scale(x)
        return change if scale is None else scale * change

    def _strengths_now(self, context: Context, grid: tuple[int, int] | None) -> torch.Tensor:
        """`(1 or images, 1 or P, m)`."""
        parts = [self._on_grid(context.at_step(table), context, grid) for table in self.strengths]
        if len(parts) == 1:
            return parts[0]
        shape = [max(part.shape[i] for part in parts) for i in (0, 1)]
        return torch.cat([part.expand(*shape, -1) for part in parts], -1)

    @staticmethod
    def _on_grid(now: torch.Tensor, context: Context, grid: tuple[int, int] | None) -> torch.Tensor:
        """Strengths of one step, `(1 or images, 1 or H, 1 or W, m)` -> `(1 or images, 1 or P, m)`."""
        check_images(len(now), context)
        if now.shape[1:3] != (1, 1):
            assert grid is not None
            if tuple(now.shape[1:3]) != grid:
                now = resize_map(now.movedim(-1, 1), grid).movedim(1, -1)
        return now.flatten(1, 2)

    def _mask_at(self, grid: tuple[int, int] | None, images: int) -> torch.Tensor:
        """The mask on the site's grid, `(1 or images, P, 1)`."""
        assert self.mask is not None and grid is not None
        mask, (n, _, height, width) = self.mask, self.mask.shape
        if n not in (1, images):
            raise InputError(f"The mask has {n} images and the batch {images}; pass one mask, or one for each image.")
        if abs(height * grid[1] - width * grid[0]) > max(height, width):
            raise InputError(
                f"The mask is {height} x {width}, which does not fit a site of {grid[0]} x {grid[1]}; "
                "make it as high and wide as the image, or smaller in the same ratio."
            )
        return self._keep(("mask", grid), lambda: average_areas(mask, grid).flatten(2).transpose(1, 2))

    def _chosen_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """`(P, 1)`: 1 at the tokens."""
        count, tokens = x.shape[-2], self.edit.tokens
        if max(tokens) >= count:
            raise InputError(f"Token {max(tokens)} is out of range; the site has the tokens 0 to {count - 1}.")
        places = lambda: torch.arange(count, device=x.device)  # noqa: E731
        return self._keep(("tokens", count), lambda: sum((places() == t).float() for t in tokens)[:, None])  # type: ignore[union-attr, index]

    def _overwritten(
        self, x: torch.Tensor, z: torch.Tensor, bounds: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """The change that gives places with a latent above its bound the row of the nearest place with none."""
        fires = self.edit.operation.apply(z, bounds).any(-1)
        places = self._keep(("places", grid), lambda: _places(grid, x.device))
        return _overwritten(x.float().flatten(0, -3), fires.flatten(0, -2), places).unflatten(0, x.shape[:-2])

    def _keep(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` gives, for the rest of the run; under `torch.compile` always anew, since graphs keep nothing."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def check_images(count: int, context: Context) -> None:
    """Raise `InputError` if there are `count` strengths, one an image, and another number of images."""
    if count not in (1, context.images):
        raise InputError(
            f"A strength has {count} numbers and the batch {context.images} images; "
            "pass one number, or one for each image."
        )


def prepare(
    edit: Edit,
    sae: SparseAutoencoder,
    statistics: LatentStatistics | None,
    context: Context,
    decision: Decision | None,
    device: torch.device,
) -> PreparedEdit:
    """`edit` for a run at the context's timesteps."""
    tables = strength_tables(edit.strengths, context)
    features = [edit.features[i] for group, _ in tables for i in group]
    strengths = [table for _, table in tables]
    if edit.unit != "raw":
        assert statistics is not None
        context.check_training_scale(f"unit={edit.unit!r}")
        units = torch.stack([statistics.at(t).scale(edit.unit)[features] for t in context.timesteps])
        of_groups = units[:, None, None, None].split([len(group) for group, _ in tables], -1)
        strengths = [table * unit for table, unit in zip(strengths, of_groups, strict=True)]
    identity = edit.operation.identity
    inside = [edit.in_window(step, context.step_count) for step in context.steps]
    changing = [
        identity is None or any((table[i] != identity).any().item() for table in strengths) for i in range(len(inside))
    ]
    prepared = PreparedEdit(
        edit,
        tuple(table.contiguous().to(device) for table in strengths),
        torch.tensor(inside, dtype=torch.float32, device=device),
        tuple(i and c for i, c in zip(inside, changing, strict=True)),
        torch.tensor(features, device=device),
        sae.decoder_rows(features).to(device),
        None if edit.mask is None else edit.mask.to(device),
        decision,
        sae.row_scale,
    )
    prepared.table = _table(prepared)
    elsewhere = edit.mask is not None or edit.tokens or decision is not None
    prepared.is_shift = prepared.table is not None and not (elsewhere or edit.preserve_norm or sae.input_norm)
    return prepared


def why_idle(edit: Edit, context: Context) -> str | None:
    """Why an edit did not act in a run, or not on all that it is for, and the remedy; `None` if it did."""
    if not any(edit.in_window(step, context.step_count) for step in context.steps):
        return (
            f"its window from start={edit.start:g} to stop={edit.stop:g} holds none of the run's {context.step_count} "
            "steps; widen it, or take more steps"
        )
    missing = context.lacks(edit.weights)
    if missing and (len(missing) == len(edit.weights) or min(edit.weights.values()) < 0):
        return (
            f"the run had no branch {' or '.join(missing)}, for which branch={edit.branch!r} is; "
            "turn guidance on, or pass branch='cond'"
        )
    return None


def _table(edit: PreparedEdit) -> torch.Tensor | None:
    """`PreparedEdit.table`, where there is one and it is not too large."""
    strengths = edit.strengths[0]  # all of them, if they have no places
    steps, images, *places, _ = strengths.shape
    if edit.edit.operation.needs_code or places != [1, 1]:
        return None
    if steps * images * edit.directions.shape[-1] > TABLE_LIMIT:
        return None
    return edit.inside[:, None, None] * (strengths[:, :, 0, 0] @ edit.directions)


def _places(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Row and column of every place of a grid, `(P, 2)`."""
    height, width = grid
    return torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device)).float()


def _overwritten(x: torch.Tensor, fires: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The change that gives every place that fires the row of the nearest place that does not (PER, 2606.31699).

    `x (images, P, d)`, `fires (images, P)`, `places (P, 2)`. An image in which all places fire is left as it is.
    """
    distance = torch.cdist(places, places) + torch.where(fires, torch.inf, 0.0)[:, None, :]  # (images, P, P)
    nearest = distance.argmin(-1)
    moved = x.gather(1, nearest[..., None].expand_as(x)) - x
    changes = fires & ~fires.all(1, keepdim=True)
    return torch.where(changes[..., None], moved, 0.0)
