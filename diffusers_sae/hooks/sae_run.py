"""SAEs in one run: alone, and all that see one tensor together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..context import Context
from ..delta import neutral, preserve_norm
from ..edits import Edit
from ..errors import InputError
from ..layouts import LAYOUTS
from ..prepared import PreparedEdit
from ..rules import Decision
from ..saes import SparseAutoencoder
from ..shifts import Shifts
from ..sites import Place, Site

Grid = Callable[[], tuple[int, int]]
"""Gives height and width of a site's positions; it raises where they lie on no grid."""


@dataclass(eq=False)
class LoadedSAE:
    """An SAE at a site of one pipeline, with its edits: a part of the pipeline's plan."""

    name: str
    sae: SparseAutoencoder
    site: Site
    place: Place
    enabled: bool = True
    edits: list[Edit] = field(default_factory=list)

    def in_run(self, context: Context, prepared: list[PreparedEdit], decisions: list[Decision]) -> SAERun:
        """The SAE with its edits as one run needs them."""
        return SAERun(self, context, prepared, decisions)


class SAERun:
    """An SAE in one run: its edits, made ready, and the rules that look at it."""

    shifts: Shifts | None

    def __init__(
        self, loaded: LoadedSAE, context: Context, prepared: list[PreparedEdit], decisions: list[Decision]
    ) -> None:
        self.name, self.sae, self.site, self.loaded = loaded.name, loaded.sae, loaded.site, loaded
        self.context, self.prepared, self.decisions = context, prepared, decisions
        shifts = [edit for edit in prepared if edit.is_shift]
        self.shifts = Shifts(shifts) if shifts else None

    def shift(self) -> torch.Tensor | None:
        """What edits add now that no activation shapes; see `Shifts.at`."""
        return None if self.shifts is None else self.shifts.at(self.context)

    @property
    def acts(self) -> bool:
        """Whether it has edits, or rules that look at it."""
        return bool(self.prepared or self.decisions)

    def reads(self) -> bool:
        """Whether an edit of the run, or a rule, depends on activations."""
        shifts = self.shifts is not None and all(edit.is_shift for edit in self.prepared)
        return bool(self.decisions) or (bool(self.prepared) and not shifts)

    def due(self, branch: str) -> list[PreparedEdit]:
        """The edits, those in `shift` left out, that may change rows of the branch now."""
        rest = self.prepared if self.shifts is None else [edit for edit in self.prepared if not edit.is_shift]
        return [edit for edit in rest if edit.needs(branch, self.context)]

    def together(self, branch: str) -> tuple[Any, ...]:
        """Branches for which this is equal are changed alike, so that one call of `change` does for both."""
        due = self.due(branch)
        acting = [edit for edit in self.prepared if edit in due or edit.keeps_norm(branch, self.context)]
        return tuple((self.prepared.index(edit), edit.edit.weights[branch]) for edit in acting)

    def change(self, x: torch.Tensor, branch: str, grid: Grid) -> torch.Tensor | None:
        """`M · s(t) · (dec(z') - dec(z))` of the edits that are due, or `None` where nothing changes.

        `x` is `(..., images, P, d)`, with the branches in front that are changed together with `branch`; the result is
        in fp32 and broadcasts to it. `grid` gives height and width of the P positions.
        """
        due = self.due(branch)
        codes = iter(self._codes(x, [edit.features for edit in due if edit.edit.operation.needs_code]))
        total: torch.Tensor | None = None
        for edit in due:
            z = next(codes) if edit.edit.operation.needs_code else None
            delta = edit.change(x, z, branch, self.context, grid() if edit.needs_grid else None)
            total = delta if total is None else total + delta
        return total

    def norm_kept(self, x: torch.Tensor, branch: str, grid: Grid) -> torch.Tensor | bool:
        """Which rows of `x (..., images, P, d)` keep their norm: all, none, or bool that broadcasts to `x`."""
        edits = [edit for edit in self.prepared if edit.keeps_norm(branch, self.context)]
        reaches = [edit.reach(x, self.context, grid() if edit.needs_grid else None) for edit in edits]
        if any(reach is None for reach in reaches) or not edits:
            return bool(edits)
        return functools.reduce(torch.logical_or, [reach > 0 for reach in reaches if reach is not None])

    def _codes(self, x: torch.Tensor, features: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The codes of several groups of features, `(..., images, P, m)` each, in one encoding."""
        if not features:
            return ()
        if len(features) == 1:
            return (self.sae.encode_only(x, features[0]),)
        return self.sae.encode_only(x, torch.cat(features)).split([len(each) for each in features], -1)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """What the SAE takes of a part of a batch, `(images, P, d)`."""
        rows = LAYOUTS[self.site.layout].to_rows(x)
        if rows.shape[-1] != self.sae.d_in:
            raise InputError(
                f"The SAE {self.name!r} takes activations of width {self.sae.d_in} and {self.site} has "
                f"{rows.shape[-1]}; load an SAE that was trained at this site"
                + (", or make images of the size it was trained at." if self.site.layout != "positions" else ".")
            )
        return rows


class SAEsOfSite:
    """The SAEs at one site in one run. All of them see the tensor as the model made it, and their changes add up."""

    def __init__(self, context: Context, saes: list[SAERun]) -> None:
        self.context, self.saes = context, saes
        self._keeps_norm = any(edit.edit.preserve_norm for sae in saes for edit in sae.prepared)
        if self._keeps_norm:  # which depends on the sum of all changes, so that none may be added beforehand
            for sae in saes:
                sae.shifts = None

    def reads(self) -> bool:
        """Whether an edit or a rule depends on activations."""
        return any(sae.reads() for sae in self.saes)

    def shift(self, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to a batch `x` that no activation shapes, with one row or all; -0 where nothing."""
        shifts = []
        for sae in self.saes:
            shift = sae.shift()
            if shift is not None:
                sae.rows(x)  # which raises if the SAE does not fit
                shifts.append(LAYOUTS[sae.site.layout].from_rows(shift, x))
        return neutral(sum(shifts[1:], shifts[0])) if len(shifts) > 1 else next(iter(shifts), None)

    def decide(self, seen: torch.Tensor, grid: Grid) -> None:
        """Apply the rules that look at these SAEs to rows of the cond branch."""
        for sae in self.saes:
            for decision in sae.decisions:
                decision.see(sae.sae, sae.rows(seen), grid() if decision.rule.at == "place" else None)

    def together(self, branch: str) -> list[tuple[Any, ...]]:
        """Branches for which this is equal are changed alike."""
        return [sae.together(branch) for sae in self.saes if sae.prepared]

    def change(self, seen: torch.Tensor, branches: tuple[str, ...], grid: Grid) -> torch.Tensor | None:
        """The sum of the changes, in the shape of the site's tensor, for rows of branches that are changed alike."""
        each = [self._change(sae, seen, branches, grid) for sae in self.saes if sae.prepared]
        changes = [change for change in each if change is not None]
        if not changes:
            return None
        total = sum(changes[1:], changes[0])
        for layout in {sae.site.layout: None for sae in self.saes} if self._keeps_norm else ():
            total = self._with_norm_kept(layout, total, seen, branches, grid)
        return total

    def _change(self, sae: SAERun, seen: torch.Tensor, branches: tuple[str, ...], grid: Grid) -> torch.Tensor | None:
        """The change of one SAE for rows of branches that are changed alike, in the shape of the site's tensor."""
        change = sae.change(self._by_branch(sae.rows(seen), branches), branches[0], grid)
        if change is None:
            return None
        return LAYOUTS[sae.site.layout].from_rows(self._of_batch(change, branches), seen)

    def _with_norm_kept(
        self, layout: str, change: torch.Tensor, seen: torch.Tensor, branches: tuple[str, ...], grid: Grid
    ) -> torch.Tensor:
        """`change`, in the shape of the site's tensor, such that rows of the layout keep their norm where asked to."""
        to_rows, from_rows = LAYOUTS[layout]
        rows = self._by_branch(to_rows(seen), branches)
        each = [sae.norm_kept(rows, branches[0], grid) for sae in self.saes if sae.site.layout == layout]
        kept = [where for where in each if where is not False]
        if not kept:
            return change
        delta = self._by_branch(to_rows(change.expand(len(change), *seen.shape[1:])), branches)
        scaled = preserve_norm(rows.float(), delta)
        some = [where for where in kept if isinstance(where, torch.Tensor)]
        if len(some) == len(kept):
            scaled = torch.where(functools.reduce(torch.logical_or, some), scaled, delta)
        return from_rows(self._of_batch(scaled, branches), seen)

    @staticmethod
    def _by_branch(rows: torch.Tensor, branches: tuple[str, ...]) -> torch.Tensor:
        """Rows of several branches with the branches in front, `(branches, images, P, d)`; of one as they are."""
        if len(branches) == 1:
            return rows
        return rows.unflatten(0, (len(branches), -1))

    def _of_batch(self, change: torch.Tensor, branches: tuple[str, ...]) -> torch.Tensor:
        """A change that broadcasts to `(branches, images, P, d)` as rows of the batch."""
        if len(branches) == 1:
            return change
        return change.expand(len(branches), self.context.images, *change.shape[-2:]).flatten(0, 1)
