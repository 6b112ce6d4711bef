"""All quality figures of the shipped models, piece by piece; each piece is recorded as soon as it is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checksums import sha256
from ..evaluation.baselines import ERROR_TERMS, load_with_error_term
from ..evaluation.ledger import Ledger
from ..evaluation.rows import Rows
from ..evaluation.unlearning import UnlearningAccuracy, unlearning_accuracy
from ..saes import TopKSAE
from . import measure_model, measure_removal, measure_sae, measure_steering
from .measure_removal import (
    REMOVAL,
    SEED,
    TUNING_SEED,
    Removal,
    Sighting,
    cells_of,
    draw_cells,
    edits_away,
    outcomes,
    sightings,
)
from .shipped import MODELS, SITES, load_detectors, load_judge, load_pipeline, load_scores
from .world import CONCEPTS, FACTORS, Scene, grid

NO_RULE = "error_term, no rule"
COMMON: dict[str, tuple[Any, ...]] = {
    "sites": (SITES[:1], SITES[1:], SITES),
    "by": ("activity", "effect", "difference"),
    "ruled": (True, False),
    "error_term": tuple(ERROR_TERMS),
    NO_RULE: tuple(ERROR_TERMS),
}
VARIATIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "style": {"strength": (-0.5, -1.0, -1.25, -1.5, -2.0), "latents": (13, 51, 102, 205), **COMMON},
    "object": {"strength": (-0.5, -1.0, -1.5, -2.0), "latents": (13, 51, 102, 205), **COMMON},
}
"""What the curves vary about the chosen point, one at a time."""

CURVE_TARGETS = {"style": ("3d", "ink", "pixel art", "neon"), "object": ("panda", "rocket", "hamburger", "cook")}
"""Concepts that the curves are averaged over."""

Cells = Sequence[tuple[int, Scene]]


def fingerprint(models: Path = MODELS) -> dict[str, str]:
    """SHA-256 of every weights file that is measured here; results of other weights must not mix with these."""
    files = (p.relative_to(models) for p in sorted(models.rglob("*.safetensors")))
    return {str(p): sha256(models / p) for p in files if p.parts[0] != "emoji-kandinsky"}


class Quality:
    """Measures the models in a folder. Every method returns JSON data and goes on where a stopped one was.

    `scenes` are the cells of the grid that `bare`, `styles` and `objects` are measured on.
    """

    def __init__(self, ledger: Ledger, models: Path = MODELS, scenes: Sequence[Scene] | None = None) -> None:
        self._ledger = ledger
        self._scenes = grid() if scenes is None else list(scenes)
        self._first_steps: dict[int, torch.Tensor] = {}
        self._pipe = load_pipeline(models / "emoji-sd")
        self._judge = load_judge(models / "judge")
        self._saes = {site: TopKSAE.from_pretrained(models / "saes" / site).float() for site in SITES}
        self._scores = load_scores(models / "saes")
        self._towards = measure_steering.load_towards(models / "towards.json")
        self._detectors = load_detectors(models / "saes")
        self._size = sum(p.stat().st_size for p in models.rglob("*") if p.is_file())

    def model(self, images: int = 512) -> dict[str, Any]:
        """How often emoji-sd draws what it is asked for, how long an image takes, how large everything shipped is."""

        def measure() -> dict[str, Any]:
            accuracy = measure_model.accuracy(self._pipe, self._judge, images)
            seconds = measure_model.seconds_an_image(self._pipe)
            return {
                "accuracy": {factor: accuracy.share(factor).as_dict() for factor in FACTORS},
                "rows": accuracy.as_dict(),
                "seconds_an_image": round(seconds, 3),
                "megabytes": round(self._size / 1e6, 1),
            }

        return self._ledger.get(f"model {images}", measure)

    def sae(self, images: int = 256) -> dict[str, Any]:
        """Reconstruction on held-out activations."""
        return self._ledger.get(f"sae {images}", lambda: measure_sae.reconstruction(self._pipe, self._saes, images)[0])

    def steering(self, images: int = 32) -> dict[str, Any]:
        """Steering towards every concept."""
        figures = {}
        for concept, how in tqdm(self._towards.items(), desc="steering"):
            factor = CONCEPTS[concept]
            scenes = measure_steering.silent_scenes(factor, images)

            def seen(scenes: Sequence[Scene] = scenes) -> list[Any]:
                return measure_steering.judged(self._pipe, self._judge, scenes)

            bare = self._ledger.get(f"bare {factor} {images} {measure_steering.SEED}", seen)
            with self._loaded():
                for edit in measure_steering.edits_towards(self._scores, concept, how):
                    self._pipe.steer(**edit)
                steered = self._ledger.get(f"towards {concept} {images} {measure_steering.SEED} {how}", seen)
            figures[concept] = {
                "how": how._asdict(),
                "seed": measure_steering.SEED,
                "tuning_seed": measure_steering.TUNING_SEED,
                **measure_steering.steering_rows(concept, scenes, bare, steered).figures(),
            }
        return figures

    def curves(self, images: int = 8) -> dict[str, Any]:
        """Removal figures about the chosen point of each domain, over some targets and some cells of the grid."""
        points = [
            (domain, what, value, _varied(REMOVAL[domain], what, value))
            for domain in REMOVAL
            for what, values in VARIATIONS[domain].items()
            for value in values
        ]
        figures: dict[str, Any] = {domain: {what: [] for what in VARIATIONS[domain]} for domain in REMOVAL}
        for domain, what, value, how in tqdm(points, desc="curves"):
            total = self._removal(CURVE_TARGETS[domain], how, lambda target: cells_of(target, images), TUNING_SEED)
            point = {"value": value, "how": how.as_dict(), "chosen": how == REMOVAL[domain], "seed": TUNING_SEED}
            figures[domain][what].append({**point, **total.as_dict(), "rows": total.rows_as_dict()})
        return figures

    def bare(self) -> dict[str, Any]:
        """What the judge sees in the images of the grid when nothing is removed."""
        seen = self._bare_grid(SEED).values()
        columns = {
            "style": [s.style == self._scenes[s.cell].style for s in seen],
            "object": [s.object == self._scenes[s.cell].object for s in seen],
            "unsure": [bool(s.unsure) for s in seen],
        }
        return Rows([s.cell for s in seen], columns).figures()

    def styles(self) -> dict[str, Any]:
        """Removal of every style at the chosen point, each over the full grid."""
        return self._full_removal("style")

    def objects(self) -> dict[str, Any]:
        """Removal of every object at the chosen point, each over the full grid."""
        return self._full_removal("object")

    def _full_removal(self, domain: str) -> dict[str, Any]:
        how, cells = REMOVAL[domain], list(enumerate(self._scenes))
        targets = [value for value in FACTORS[domain] if any(getattr(s, domain) == value for s in self._scenes)]
        each = {t: self._removal([t], how, lambda _: cells, SEED) for t in tqdm(targets, desc=f"removal of {domain}s")}
        total = sum(each.values(), UnlearningAccuracy())
        figures = {
            target: {**result.as_dict(), **self._detection(target), "rows": result.rows_as_dict()[target]}
            for target, result in each.items()
        }
        seeds = {"seed": SEED, "tuning_seed": TUNING_SEED}
        return {"how": how.as_dict(), **seeds, **total.as_dict(), "targets": figures}

    def _detection(self, target: str) -> dict[str, Any]:
        """Shares of the target's and of the other cells in which the detector finds it."""
        of_target = [getattr(cell, CONCEPTS[target]) == target for cell in self._scenes]
        found = self._found(target, SEED)
        columns = {
            "found": [f if inside else None for f, inside in zip(found, of_target, strict=True)],
            "false_alarms": [None if inside else f for f, inside in zip(found, of_target, strict=True)],
        }
        rows = Rows(range(len(found)), columns)
        return {name: rows.share(name).as_dict() for name in columns}

    def _bare_grid(self, seed: int) -> dict[int, Sighting]:
        cells = list(enumerate(self._scenes))
        record = self._ledger.get(f"bare grid of {len(cells)} {seed}", lambda: self._sightings(cells, seed))
        return {s.cell: s for s in (Sighting(*each) for each in record)}

    def _removal(
        self, targets: Sequence[str], how: Removal, cells: Callable[[str], Cells], seed: int
    ) -> UnlearningAccuracy:
        return sum((self._removal_of(target, how, cells(target), seed) for target in targets), UnlearningAccuracy())

    def _removal_of(self, target: str, how: Removal, cells: Cells, seed: int) -> UnlearningAccuracy:
        bare = self._bare_grid(seed)
        found = self._found(target, seed) if how.ruled else [True] * len(bare)
        edited = [cell for cell in cells if found[cell[0]]]
        # images that the rule leaves alone are bit-identical to the bare ones and are not made again
        unedited = [bare[i] for i, _ in cells if not found[i]]

        def measure() -> list[Sighting]:
            try:
                for site, sae in self._saes.items():
                    load_with_error_term(self._pipe, sae, site, site, how.error_term)
                for edit in edits_away(self._scores, self._detectors, target, how):
                    self._pipe.steer(**edit)
                return self._sightings(edited, seed)
            finally:
                self._pipe.unload_sae()

        record = self._ledger.get(f"away {target} {json.dumps(how.as_dict())} {len(cells)} {seed}", measure)
        seen, domain = [Sighting(*s) for s in record] + unedited, CONCEPTS[target]
        changed = {i for i, _ in edited}
        return unlearning_accuracy(outcomes(seen, bare, self._scenes, domain, changed), domain, target)

    def _found(self, target: str, seed: int) -> list[bool]:
        """For every cell of the grid, whether the detector finds the target in it."""
        if seed not in self._first_steps:
            self._first_steps[seed] = measure_removal.first_steps(self._pipe, SITES[0], self._scenes, seed)
        return self._detectors.rule(target).holds(self._saes[SITES[0]], self._first_steps[seed]).tolist()

    def _sightings(self, cells: Cells, seed: int) -> list[Sighting]:
        return sightings(self._judge, cells, draw_cells(self._pipe, cells, seed))

    @contextmanager
    def _loaded(self) -> Iterator[None]:
        for site, sae in self._saes.items():
            self._pipe.load_sae(sae, site=site, adapter_name=site)
        try:
            yield
        finally:
            self._pipe.unload_sae()


def _varied(how: Removal, what: str, value: Any) -> Removal:
    if what == NO_RULE:
        return replace(how, error_term=value, ruled=False)
    return replace(how, **{what: value})
