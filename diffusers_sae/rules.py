"""Rules: conditions on what an SAE sees in an image, which decide whether an edit acts on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch
import torch.nn.functional as F

from .errors import InputError
from .saes import SparseAutoencoder

PLACES = ("image", "place")


@dataclass(frozen=True, eq=False)
class Rule:
    """An edit with this rule acts only where `Σ_j w_j · z_j > above`, as the cond branch shows it.

    With `at="image"`, z_j is latent j's mean over the places of the image, and every image is decided once in a run of
    the pipeline, when the rule's SAE is reached first. With `at="place"`, z_j is what latent j is at each place, and
    the rule is decided anew whenever its SAE is reached. Edits that come before that rest.

    Args:
        features: `{feature: weight}`, in units of 1 / raw activation.
        above: the bound.
        adapter_name: the SAE whose latents are looked at; by default that of the edit.
        at: `image` or `place`.
    """

    features: Mapping[int, float]
    above: float = 0.0
    adapter_name: str | None = None
    at: str = "image"

    def holds(self, sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
        """Where it holds, from rows `x (images, P, d)`: `(images,)` bool, or `(images, P)` for rules at places."""
        decision = Decision(self, x.device)
        decision.see(sae, x, None)
        assert decision.holds is not None
        return decision.holds


class Decision:
    """Where a rule holds in one run, as far as that is decided.

    `holds` is `(images,)` bool, or `(images, P)` for a rule at places.
    """

    def __init__(self, rule: Rule, device: torch.device) -> None:
        self.rule = rule
        self.holds: torch.Tensor | None = None
        self._features = torch.tensor(list(rule.features), device=device)
        self._weights = torch.tensor(list(rule.features.values()), device=device, dtype=torch.float32)
        self._grid: tuple[int, int] | None = None

    def see(self, sae: SparseAutoencoder, x: torch.Tensor, grid: tuple[int, int] | None) -> None:
        """Decide by rows `x (images, P, d)` of the cond branch, unless that was done."""
        if self.holds is not None and self.rule.at == "image":
            return
        z = sae.encode_only(x, self._features)
        self.holds = (z if self.rule.at == "place" else z.mean(1)) @ self._weights > self.rule.above
        self._grid = grid

    def weights(self, x: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        """1 where it holds and 0 elsewhere, `(1 or images, 1 or P, 1)`, for rows `x (..., images, P, d)` on a grid."""
        if self.holds is None:
            return x.new_zeros(1, 1, 1, dtype=torch.float32)
        holds = self.holds.to(x.device, torch.float32)
        images, places = x.shape[-3:-1]
        if len(holds) != images:  # what was decided by prompt, for each of its images
            holds = holds.repeat_interleave(images // len(holds), 0)
        if self.rule.at == "image":
            return holds[:, None, None]
        if holds.shape[1] != places:
            if grid is None or self._grid is None:
                raise InputError(
                    f"A rule at places saw {holds.shape[1]} places and the site it acts on has {places}, which do "
                    "not lie on grids; put both at one site, or use at='image'."
                )
            holds = F.interpolate(holds.unflatten(1, self._grid)[:, None], grid, mode="nearest").flatten(1)
        return holds[..., None]


def checked_rule(rule: object, adapter_name: str, sae: SparseAutoencoder) -> Rule:
    """The rule that `steer` was given, about the SAE named `adapter_name`; raises `InputError`."""
    if not isinstance(rule, Rule):
        raise InputError(f"when={rule!r} is not a rule; pass Rule({{feature: weight}}, above=...).")
    if not isinstance(rule.features, Mapping) or not rule.features:
        raise InputError(f"A rule takes a dict {{feature: weight}} with at least one feature, not {rule.features!r}.")
    if rule.at not in PLACES:
        raise InputError(f"at={rule.at!r} is not where a rule can hold; choose one of {', '.join(PLACES)}.")
    features = {sae.checked_feature(j): w for j, w in rule.features.items()}
    if not all(isinstance(w, Real) and math.isfinite(w) for w in (*features.values(), rule.above)):
        raise InputError("A rule has weights or a bound that are not finite numbers; pass finite ones.")
    return rule if rule.adapter_name == adapter_name else replace(rule, adapter_name=adapter_name)
