"""Removing a concept, measured on the grid of objects and styles as UnlearnCanvas defines it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..evaluation.unlearning import Outcome
from ..features.concepts import ConceptScores
from .judge import Judge
from .shipped import SITES, generate, look
from .world import CONCEPTS, Scene, grid

SEED = 60_000_000
CONFIDENT = 0.5
ARTEFACT_FACTORS = ("object", "style", "background")


@dataclass(frozen=True)
class Removal:
    """How a concept is removed: at which sites, which latents (so many at each timestep), and how.

    `strength` and `by` are those of `ConceptScores.away`; `error_term` is one of `evaluation.baselines.ERROR_TERMS`.
    """

    sites: tuple[str, ...] = SITES
    by: str = "effect"
    latents: int = 8
    strength: float = -1.0
    error_term: str = "kept"

    def percentile(self, n_latents: int) -> float:
        """Above which `latents` of them lie."""
        return 100 * (1 - self.latents / n_latents)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sites": list(self.sites)}


REMOVAL = {"style": Removal(), "object": Removal()}
"""The chosen point of each domain."""


def edits_away(scores: Mapping[str, ConceptScores], concept: str, how: Removal) -> list[dict[str, Any]]:
    """Arguments of `steer`, one dict for each site; the SAEs are loaded under the sites' names."""
    return [
        {
            "features": scores[site].away(concept, how.strength, how.percentile(scores[site].n_latents), how.by),
            "adapter_name": site,
            "mode": "scale",
        }
        for site in how.sites
    ]


def cells_of(target: str, images: int) -> list[tuple[int, Scene]]:
    """Random cells of the grid with their numbers: up to `images` of the target's, and as many others."""
    rng = random.Random(f"{SEED} {target}")
    cells = list(enumerate(grid()))
    factor = CONCEPTS[target]
    inside = [c for c in cells if getattr(c[1], factor) == target]
    outside = [c for c in cells if getattr(c[1], factor) != target]
    return rng.sample(inside, min(images, len(inside))) + rng.sample(outside, images)


def outcomes(pipe: Any, judge: Judge, cells: Sequence[tuple[int, Scene]]) -> list[Outcome]:
    """One image a cell, from the noise of the cell's own seed, and what the judge sees in it."""
    images = list(generate(pipe, [s.caption() for _, s in cells], [SEED + i for i, _ in cells]))
    return [
        Outcome(
            str(scene.style),
            str(scene.object),
            seen["style"][0],
            seen["object"][0],
            any(seen[f][1] < CONFIDENT for f in ARTEFACT_FACTORS),
        )
        for (_, scene), seen in zip(cells, look(judge, images), strict=True)
    ]
