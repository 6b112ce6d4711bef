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

from diffusers_sae.demo.measure_removal import Removal, Sighting, cells_of, outcomes, sightings
from diffusers_sae.demo.measure_steering import edits_towards, judged, load_towards, silent_scenes, steering_figures
from diffusers_sae.demo.quality import fingerprint
from diffusers_sae.demo.shipped import (
    MODELS,
    SITES,
    generate,
    load_detectors,
    load_judge,
    load_pipeline,
    load_scores,
    look,
)
from diffusers_sae.demo.world import CONCEPTS, concept_name
from diffusers_sae.evaluation.ledger import Ledger
from diffusers_sae.evaluation.shares import Share
from diffusers_sae.evaluation.unlearning import unlearning_accuracy

SEED = 90_000_000
BRANCHES = ("cond", "uncond", "both", "contrast")
BRANCH_CONCEPTS = ("neon", "ink", "3d", "red background", "black background", "rocket", "cactus", "hamburger")
MASK_CONCEPTS = ("black background", "red background", "green background", "yellow background", "blue background")
STARTS = (0.0, 0.2, 0.4, 0.6)
REMOVED = ("panda", "rocket", "hamburger", "cook")
SCALES = (0.0, -1.0, -2.0, -4.0)
BOUNDS = (0.5, 0.25, 0.1)
LATENTS = (2, 8)


class Choices:
    """The embedded model with its SAEs, and a ledger of what was measured."""

    def __init__(self, work: Path) -> None:
        self._pipe, self._judge = load_pipeline(), load_judge()
        self._scores, self._detectors = load_scores(), load_detectors()
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

    def masks(self, images: int) -> list[dict[str, Any]]:
        """Which half of the background turns, for a mask over the left half, by when the edits begin.

        The judge sees each half together with its mirror image, as a whole picture.
        """
        mask = torch.zeros(64, 64)
        mask[:, :32] = 1
        towards, found = load_towards(), []
        for start in STARTS:
            shares = {name: Share() for name in ("left_before", "left_turned", "right_turned", "right_as_before")}
            for concept in tqdm(MASK_CONCEPTS, desc=f"masks from {start}"):
                prompts = [s.caption() for s in silent_scenes("background", images, SEED)]

                def halves(prompts: list[str] = prompts) -> list[list[str]]:
                    return self._backgrounds(list(generate(self._pipe, prompts, range(SEED, SEED + images))))

                bare = self._ledger.get(f"bare halves {images}", halves)
                edits = edits_towards(self._scores, concept, towards[concept])
                work = partial(self._steered, edits, halves, mask=mask, start=start, stop=1.0)
                seen = self._ledger.get(f"halves {start} {concept} {images}", work)
                for (left, right), (old_left, old_right) in zip(seen, bare, strict=True):
                    shares["left_before"].count(old_left == concept)
                    shares["left_turned"].count(left == concept)
                    if old_right != concept:
                        shares["right_turned"].count(right == concept)
                        shares["right_as_before"].count(right == old_right)
            found.append({"start": start, **{name: share.as_dict() for name, share in shares.items()}})
        return found

    def _backgrounds(self, images: list[torch.Tensor]) -> list[list[str]]:
        """The background of the left and of the right half of each image `(3, 64, 64)`."""
        left, right = torch.stack(images).chunk(2, -1)
        names = []
        for half in (torch.cat([left, left.flip(-1)], -1), torch.cat([right.flip(-1), right], -1)):
            names.append([concept_name("background", seen["background"][0]) for seen in look(self._judge, half)])
        return [list(each) for each in zip(*names, strict=True)]

    def removal(self, images: int) -> dict[str, Any]:
        """Unlearning accuracy and artefacts of `scale` and of `replace`, with the same latents under the same rule."""
        found: dict[str, Any] = {"scale": [], "replace": []}
        for latents in LATENTS:
            for mode, values in (("scale", SCALES), ("replace", BOUNDS)):
                for value in tqdm(values, desc=f"{mode} {latents}"):
                    each = [self._removed(target, mode, value, latents, images) for target in REMOVED]
                    total = sum(each[1:], each[0])
                    found[mode].append({"latents": latents, "value": value, **total.as_dict()})
        return found

    def _removed(self, target: str, mode: str, value: float, latents: int, images: int) -> Any:
        cells = cells_of(target, images)
        bare = self._ledger.get(f"bare {target} {images}", lambda: sightings(self._pipe, self._judge, cells))
        edits = [self._removal_edit(site, target, mode, value, latents) for site in SITES]
        steered = self._ledger.get(
            f"{mode} {value} {latents} {target} {images}",
            lambda: self._steered(edits, lambda: sightings(self._pipe, self._judge, cells)),
        )
        return unlearning_accuracy(outcomes(_sightings(steered), _by_cell(bare)), CONCEPTS[target], target)

    def _removal_edit(self, site: str, target: str, mode: str, value: float, latents: int) -> dict[str, Any]:
        scores, how = self._scores[site], Removal(by="activity", latents=latents)
        edit = {"mode": mode, "adapter_name": site, "when": self._detectors.rule(target, SITES[0])}
        percentile = how.percentile(scores.n_latents)
        if mode == "scale":
            return {"features": scores.away(target, value, percentile, how.by), **edit}
        # bounds as multiples of what the latents are on images of the concept
        chosen = scores.choose(target, percentile, how.by)
        bound = scores.activity[scores.index(target)] * value
        return {"features": scores.tables(chosen, bound, otherwise=1e9), **edit}

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
