"""How other systems write an edit back, for honest comparison; steering itself never does it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..context import Context
from ..hooks import LoadedSAE, SAERun
from ..prepared import PreparedEdit
from ..rules import Decision
from ..saes import SparseAutoencoder
from ..sites import Site, resolve

ERROR_TERMS = {"kept": 1.0, "dropped": 0.0, "wrong_sign": -1.0}
"""Weight w of the reconstruction error in `x' = dec(z') + w (x - x̂)`.

`kept` is the delta form. `dropped` is an edit without error term. `wrong_sign` is what SAeuron's code computes and
others copied: an edit that changes nothing returns `2 x̂ - x`.
"""


@dataclass(eq=False)
class WithErrorTerm(LoadedSAE):
    """An SAE whose edits are written as `dec(z') + w (x - x̂)` on every row and step that an edit addresses."""

    weight: float = 1.0

    def in_run(self, context: Context, prepared: list[PreparedEdit], decisions: list[Decision]) -> SAERun:
        return _ErrorTermRun(self, context, prepared, decisions, self.weight)


class _ErrorTermRun(SAERun):
    def __init__(
        self,
        loaded: LoadedSAE,
        context: Context,
        prepared: list[PreparedEdit],
        decisions: list[Decision],
        weight: float,
    ) -> None:
        super().__init__(loaded, context, prepared, decisions)
        self.shifts = None  # since the error term depends on activations, whatever the edit
        self._weight = weight

    def together(self, branch: str) -> tuple[Any, ...]:
        return (*super().together(branch), any(branch in edit.edit.weights for edit in self.prepared))

    def change(self, x: torch.Tensor, branch: str, grid: Callable[[], tuple[int, int]]) -> torch.Tensor | None:
        delta = super().change(x, branch, grid)
        addressed = [edit for edit in self.prepared if branch in edit.edit.weights]
        if not addressed or self._weight == 1:
            return delta
        lost = (self._weight - 1) * (x - self.sae(x))
        decisions = [edit.decision for edit in addressed]
        if None not in decisions:
            where = [d.weights(x, grid()) for d in decisions]  # type: ignore[union-attr]
            lost = lost * torch.stack(where).amax(0)
        return lost if delta is None else delta + lost


def load_with_error_term(
    pipe: Any, sae: SparseAutoencoder, site: Site | str, adapter_name: str, error_term: str
) -> None:
    """`load_sae`, with one of `ERROR_TERMS`."""
    where = Site.of(site)
    place = resolve(pipe, where)
    sae = sae.eval().requires_grad_(False)
    pipe._steering.add(WithErrorTerm(adapter_name, sae, where, place, weight=ERROR_TERMS[error_term]))
