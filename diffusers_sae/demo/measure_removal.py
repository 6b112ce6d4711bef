"""Removing a concept, measured on the grid of objects and styles as UnlearnCanvas defines it."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
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
TUNING_SEED = 62_000_000
"""Of the images by which settings are chosen; those of the figures are others."""
CONFIDENT = 0.5
"""Probability from which the judge names a factor; it is not calibrated on generated images."""
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


def first_steps(pipe: Any, site: str, scenes: Sequence[Scene], seed: int = SEED) -> torch.Tensor:
    """What a site holds at the first step of every scene's image, `(scenes, P, d)`: what rules decide by."""
    stream = stream_activations(
        pipe, [site], [s.caption() for s in scenes], batch_size=32, seed=seed, first_step_only=True, **CALL
    )
    return torch.cat([batch.rows(site)[0][0] for batch in stream])


class Sighting(NamedTuple):
    """What the judge sees in the image of one cell, and the factors that it cannot name with confidence."""

    cell: int
    style: str
    object: str
    unsure: list[str]


def draw_cells(pipe: Any, cells: Sequence[tuple[int, Scene]], seed: int = SEED) -> list[torch.Tensor]:
    """One image `(3, 64, 64)` per cell, from the noise of the cell's own seed."""
    return list(generate(pipe, [s.caption() for _, s in cells], [seed + i for i, _ in cells]))


def sightings(judge: Judge, cells: Sequence[tuple[int, Scene]], images: Sequence[torch.Tensor]) -> list[Sighting]:
    """What the judge sees in the image of each cell."""
    if not cells:
        return []
    return [
        Sighting(i, seen["style"][0], seen["object"][0], [f for f in JUDGED if seen[f][1] < CONFIDENT])
        for (i, _), seen in zip(cells, look(judge, images), strict=True)
    ]


def outcomes(
    steered: Iterable[Sighting], bare: Mapping[int, Sighting], scenes: Sequence[Scene], domain: str,
    edited: Collection[int],
) -> list[Outcome]:  # fmt: skip
    """Outcomes of removing a concept of `domain`; `edited` are the cells whose images an edit changed.

    An artefact is a factor other than `domain` that could be named in the bare image and cannot be now: `domain` is
    what should go, and an image without it need not show another value of it.
    """
    found = []
    for s in steered:
        asked, before = scenes[s.cell], bare[s.cell]
        lost = set(s.unsure) - set(before.unsure) - {domain}
        artefact = bool(lost) if s.cell in edited else None
        seen = s.style, s.object, before.style, before.object
        found.append(Outcome(s.cell, str(asked.style), str(asked.object), *seen, artefact))
    return found
