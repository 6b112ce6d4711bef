"""Rules: conditions on what an SAE sees in an image, which decide whether an edit acts on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real

import torch

from .errors import InputError
from .saes import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class Rule:
    """An edit with this rule acts only on images in which `Σ_j w_j · z̄_j > above`.

    z̄_j is latent j's mean over the places of the image. Every image is decided once in a run of the pipeline, from its
    row of the cond branch, when the rule's SAE is reached first; edits that come before that rest.

    Args:
        features: `{feature: weight}`, in units of 1 / raw activation.
        above: the bound.
        adapter_name: the SAE whose latents are looked at; by default that of the edit.
    """

    features: Mapping[int, float]
    above: float = 0.0
    adapter_name: str | None = None

    def holds(self, sae: SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
        """Whether it holds for each image, `(images,)` bool, from rows `x (images, P, d)`."""
        features = torch.tensor(list(self.features), device=x.device)
        weights = torch.tensor(list(self.features.values()), device=x.device, dtype=torch.float32)
        return sae.encode_only(x, features).mean(1) @ weights > self.above


def checked_rule(rule: object, adapter_name: str, sae: SparseAutoencoder) -> Rule:
    """The rule that `steer` was given, about the SAE named `adapter_name`; raises `InputError`."""
    if not isinstance(rule, Rule):
        raise InputError(f"when={rule!r} is not a rule; pass Rule({{feature: weight}}, above=...).")
    if not isinstance(rule.features, Mapping) or not rule.features:
        raise InputError(f"A rule takes a dict {{feature: weight}} with at least one feature, not {rule.features!r}.")
    features = {sae.checked_feature(j): w for j, w in rule.features.items()}
    if not all(isinstance(w, Real) and math.isfinite(w) for w in (*features.values(), rule.above)):
        raise InputError("A rule has weights or a bound that are not finite numbers; pass finite ones.")
    return rule if rule.adapter_name == adapter_name else replace(rule, adapter_name=adapter_name)
