"""Steering towards a concept: does the judge see it, and is everything else as it was?"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..evaluation.rows import Rows
from ..features.concepts import ConceptScores
from .judge import Judge
from .shipped import MODELS, SITES, Seen, generate, look
from .world import CONCEPT_VALUES, CONCEPTS, FACTORS, Scene, scene_with

SEED = 51_000_000
TUNING_SEED = 80_000_000
"""Of the images by which settings are chosen; those of the figures are others."""


class Towards(NamedTuple):
    """How images are moved towards a concept: where, the arguments of `ConceptScores.towards`, a window of steps."""

    sites: tuple[str, ...] = SITES[1:]
    strength: float = 1.0
    percentile: float = 95.0
    start: float = 0.0
    stop: float = 1.0


def load_towards(file: Path = MODELS / "towards.json") -> dict[str, Towards]:
    """How each concept is steered towards, as `examples/emoji_world/choose_steering.py` chose it on `TUNING_SEED`."""
    chosen = json.loads(file.read_text())
    return {concept: Towards(tuple(how.pop("sites")), **how) for concept, how in chosen.items()}


def silent_scenes(factor: str, images: int, seed: int = SEED) -> list[Scene]:
    """Scenes whose captions say nothing of `factor`, of a kind that can have it."""
    rng = random.Random(f"{seed} {factor}")
    scenes = (scene_with(factor, rng.choice(FACTORS[factor]), rng) for _ in range(images))
    silent = {factor: None, "gender": None, "skin": None} if factor == "object" else {factor: None}
    return [replace(scene, **silent) for scene in scenes]


def judged(pipe: Any, judge: Judge, scenes: Sequence[Scene], seed: int = SEED) -> list[Seen]:
    """What the judge sees in images of the scenes, steered as the pipeline is now."""
    return look(judge, list(generate(pipe, [s.caption() for s in scenes], range(seed, seed + len(scenes)))))


def edits_towards(
    scores: Mapping[str, ConceptScores], concept: str, how: Towards, instead_of: str | None = None
) -> list[dict[str, Any]]:
    """Arguments of `steer`, one dict for each site; the SAEs are loaded under the sites' names."""
    return [
        {
            "features": scores[site].towards(concept, how.strength, how.percentile, instead_of),
            "adapter_name": site,
            "start": how.start,
            "stop": how.stop,
        }
        for site in how.sites
    ]


def steering_rows(concept: str, scenes: Sequence[Scene], bare: Sequence[Seen], steered: Sequence[Seen]) -> Rows:
    """Whether images show the concept, steered (`seen`) and bare (`seen_bare`), and all other told factors are as
    before (`kept`)."""
    factor, value = CONCEPTS[concept], CONCEPT_VALUES[concept]
    columns: dict[str, list[bool | None]] = {"seen": [], "seen_bare": [], "kept": []}
    for scene, old, new in zip(scenes, bare, steered, strict=True):
        visible = replace(scene, **{factor: value}).labels()
        told = [f for f, label in scene.labels().items() if label >= 0 and visible[f] >= 0]
        columns["seen"].append(new[factor][0] == value)
        columns["seen_bare"].append(old[factor][0] == value)
        columns["kept"].append(all(new[f][0] == old[f][0] for f in told))
    return Rows(range(len(scenes)), columns)
