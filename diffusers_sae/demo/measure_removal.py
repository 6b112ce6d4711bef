"""Removing a concept, measured on the grid of objects and styles as UnlearnCanvas defines it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from ..capture import stream_activations
from ..evaluation.unlearning import Outcome
from ..features.concepts import ConceptScores
from ..features.detectors import ConceptDetectors
from .judge import Judge
from .shipped import CALL, SITES, generate, look
from .world import CONCEPTS, Scene, grid

SEED = 61_000_000
CONFIDENT = 0.5
JUDGED = ("object", "style", "background")


@dataclass(frozen=True)
class Removal:
    """How a concept is removed: at which sites, which latents (so many at each timestep), and how.

    `by` "activity" and "effect" scale the latents that `ConceptScores.away` chooses by `strength`; "difference" adds
    `strength` times what `ConceptScores.towards` adds. `ruled` removals act only on images of prompts in which the
    detector finds the concept. `error_term` is one of `evaluation.baselines.ERROR_TERMS`.
    """

    sites: tuple[str, ...] = SITES
    by: str = "effect"
    latents: int = 8
    strength: float = -1.0
    ruled: bool = True
    error_term: str = "kept"

    def percentile(self, n_latents: int) -> float:
        """Above which `latents` of them lie."""
        return 100 * (1 - self.latents / n_latents)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sites": list(self.sites)}


REMOVAL = {
    "style": Removal(SITES, "difference", 205, -1.25),
    "object": Removal(SITES, "difference", 51, -1.5),
}
"""The chosen point of each domain."""


def edits_away(
    scores: Mapping[str, ConceptScores], detectors: ConceptDetectors, concept: str, how: Removal
) -> list[dict[str, Any]]:
    """Arguments of `steer`, one dict for each site; the SAEs of all sites are loaded under the sites' names."""
    when = detectors.rule(concept, SITES[0]) if how.ruled else None
    return [{**_edit_away(scores[site], concept, how), "adapter_name": site, "when": when} for site in how.sites]


def _edit_away(scores: ConceptScores, concept: str, how: Removal) -> dict[str, Any]:
    percentile = how.percentile(scores.n_latents)
    if how.by == "difference":
        return {"features": scores.towards(concept, how.strength, percentile)}
    return {"features": scores.away(concept, how.strength, percentile, how.by), "mode": "scale"}


def cells_of(target: str, images: int) -> list[tuple[int, Scene]]:
    """Random cells of the grid with their numbers: up to `images` of the target's, and as many others."""
    rng = random.Random(f"{SEED} {target}")
    cells = list(enumerate(grid()))
    factor = CONCEPTS[target]
    inside = [c for c in cells if getattr(c[1], factor) == target]
    outside = [c for c in cells if getattr(c[1], factor) != target]
    return rng.sample(inside, min(images, len(inside))) + rng.sample(outside, images)


def first_steps(pipe: Any, site: str) -> torch.Tensor:
    """What a site holds at the first step of every cell's image, `(cells, P, d)`: what rules decide by."""
    stream = stream_activations(
        pipe, [site], [s.caption() for s in grid()], batch_size=32, seed=SEED, first_step_only=True, **CALL
    )
    return torch.cat([batch.rows(site)[0][0] for batch in stream])


class Sighting(NamedTuple):
    """What the judge sees in the image of one cell, and the factors that it cannot name with confidence."""

    cell: int
    style: str
    object: str
    unsure: list[str]


def sightings(pipe: Any, judge: Judge, cells: Sequence[tuple[int, Scene]]) -> list[Sighting]:
    """One image a cell, from the noise of the cell's own seed."""
    images = list(generate(pipe, [s.caption() for _, s in cells], [SEED + i for i, _ in cells]))
    return [
        Sighting(i, seen["style"][0], seen["object"][0], [f for f in JUDGED if seen[f][1] < CONFIDENT])
        for (i, _), seen in zip(cells, look(judge, images), strict=True)
    ]


def outcomes(steered: Iterable[Sighting], bare: Sequence[Sighting]) -> list[Outcome]:
    """An artefact is a factor that could be named in the bare image (`bare` is the full grid) and cannot now."""
    scenes = grid()
    return [
        Outcome(str(scenes[s.cell].style), str(scenes[s.cell].object), s.style, s.object,
                bool(set(s.unsure) - set(bare[s.cell].unsure)))
        for s in steered
    ]  # fmt: skip
