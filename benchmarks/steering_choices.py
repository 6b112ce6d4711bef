"""What the engine's choices are worth on the embedded model: `python benchmarks/steering_choices.py`.

Writes `benchmarks/results/steering_choices.json`: masks (does only the masked half turn?), branches (`cond`, `both`,
`uncond`, `contrast`), and removal by `replace` against `scale`, as curves of unlearning accuracy and artefacts. A
stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusers_sae.demo.measure_removal import Sighting, cells_of, outcomes, sightings
from diffusers_sae.demo.measure_steering import edits_towards, judged, load_towards, silent_scenes, steering_figures
from diffusers_sae.demo.quality import fingerprint
from diffusers_sae.demo.shipped import MODELS, SITES, generate, load_judge, load_pipeline, load_scores
from diffusers_sae.demo.world import CONCEPTS
from diffusers_sae.evaluation.ledger import Ledger
from diffusers_sae.evaluation.unlearning import unlearning_accuracy

SEED = 90_000_000
BRANCHES = ("cond", "uncond", "both", "contrast")
BRANCH_CONCEPTS = ("neon", "ink", "3d", "red background", "black background", "rocket", "cactus", "hamburger")
MASK_CONCEPTS = ("black background", "red background", "green background")
REMOVED = ("panda", "rocket", "hamburger", "cook")
SCALES = (0.0, -1.0, -2.0, -4.0, -8.0)
BOUNDS = (1.0, 0.5, 0.25, 0.1, 0.0)
LATENTS = 8


class Choices:
    """The embedded model with its SAEs, and a ledger of what was measured."""

    def __init__(self, work: Path) -> None:
        self._pipe, self._judge, self._scores = load_pipeline(), load_judge(), load_scores()
        for site in SITES:
            self._pipe.load_sae(MODELS / "saes" / site, adapter_name=site)
        self._ledger = Ledger(work / "choices.jsonl", fingerprint())

    def branches(self, images: int) -> dict[str, Any]:
        """Shares of images that show the concept and keep all else, by the branch that is edited."""
        towards, found = load_towards(), {}
        for branch in BRANCHES:
            each = {}
            for concept in tqdm(BRANCH_CONCEPTS, desc=branch):
                scenes = silent_scenes(CONCEPTS[concept], images, SEED)

                def seen(scenes: Any = scenes) -> list[Any]:
                    return judged(self._pipe, self._judge, scenes, SEED)

                bare = self._ledger.get(f"bare {CONCEPTS[concept]} {images}", seen)
                edits = edits_towards(self._scores, concept, towards[concept])
                work = partial(self._steered, edits, seen, branch=branch)
                steered = self._ledger.get(f"{branch} {concept} {images}", work)
                figures = steering_figures(concept, scenes, bare, steered)
                each[concept] = {share: figures[share]["value"] for share in ("seen", "kept")}
            mean = {share: sum(f[share] for f in each.values()) / len(each) for share in ("seen", "kept")}
            found[branch] = {"mean": mean, "concepts": each}
        return found

    def masks(self, images: int) -> dict[str, Any]:
        """Change of pixels inside and outside of a mask over the left half, for edits that turn the background."""
        mask = torch.zeros(64, 64)
        mask[:, :32] = 1
        towards, found = load_towards(), {}
        for concept in tqdm(MASK_CONCEPTS, desc="masks"):
            prompts = [s.caption() for s in silent_scenes("background", images, SEED)]

            def made(prompts: list[str] = prompts) -> torch.Tensor:
                return torch.stack(list(generate(self._pipe, prompts, range(SEED, SEED + images))))

            bare = made()
            edits = edits_towards(self._scores, concept, towards[concept])
            change = {
                name: (self._steered(edits, made, **extra) - bare).abs().mean((0, 1, 2))
                for name, extra in (("masked", {"mask": mask}), ("everywhere", {}))
            }
            found[concept] = {
                name: {"left": each[:28].mean().item(), "right": each[36:].mean().item()}
                for name, each in change.items()
            }
        return found

    def removal(self, images: int) -> dict[str, Any]:
        """Unlearning accuracy and artefacts of `scale` and of `replace`, with the same latents and no rule."""
        found: dict[str, Any] = {"scale": [], "replace": []}
        for mode, values in (("scale", SCALES), ("replace", BOUNDS)):
            for value in tqdm(values, desc=mode):
                each = [self._removed(target, mode, value, images) for target in REMOVED]
                total = sum(each[1:], each[0])
                found[mode].append({"value": value, **total.as_dict()})
        return found

    def _removed(self, target: str, mode: str, value: float, images: int) -> Any:
        cells = cells_of(target, images)
        bare = self._ledger.get(f"bare {target} {images}", lambda: sightings(self._pipe, self._judge, cells))
        edits = [self._removal_edit(site, target, mode, value) for site in SITES]
        steered = self._ledger.get(
            f"{mode} {value} {target} {images}",
            lambda: self._steered(edits, lambda: sightings(self._pipe, self._judge, cells)),
        )
        return unlearning_accuracy(outcomes(_sightings(steered), _by_cell(bare)), CONCEPTS[target], target)

    def _removal_edit(self, site: str, target: str, mode: str, value: float) -> dict[str, Any]:
        scores = self._scores[site]
        percentile = 100 * (1 - LATENTS / scores.n_latents)
        if mode == "scale":
            return {"features": scores.away(target, value, percentile, "effect"), "mode": mode, "adapter_name": site}
        # bounds as multiples of what the latents are on images of the concept
        chosen = scores.choose(target, percentile, "effect")
        bound = scores.activity[scores.index(target)] * value
        return {"features": scores.tables(chosen, bound, otherwise=1e9), "mode": mode, "adapter_name": site}

    def _steered(self, edits: list[dict[str, Any]], work: Any, **extra: Any) -> Any:
        try:
            for edit in edits:
                self._pipe.steer(**{**edit, **extra})
            return work()
        finally:
            self._pipe.reset_steering()


def _sightings(record: list[Any]) -> list[Any]:
    return [Sighting(*each) for each in record]


def _by_cell(record: list[Any]) -> Any:
    return {each.cell: each for each in _sightings(record)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("outputs/choices"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/steering_choices.json"))
    args = parser.parse_args()
    choices = Choices(args.work)
    figures = {
        "masks": choices.masks(args.images),
        "branches": choices.branches(args.images),
        "removal": choices.removal(args.images),
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({"masks": figures["masks"], "branches": {b: f["mean"] for b, f in figures["branches"].items()}}))


if __name__ == "__main__":
    main()
