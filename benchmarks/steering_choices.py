"""What the engine's choices are worth on the embedded model: `python benchmarks/steering_choices.py`.

Writes `benchmarks/results/steering_choices.json`: masks (does only the masked half turn?), branches (`cond`, `both`,
`uncond`, `contrast`), and removal by `replace` against `scale`, as curves of unlearning accuracy and damage. A stopped
run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from arguments import parse
from scipy.stats import bootstrap
from tqdm import tqdm

from diffusers_sae.demo.measure_removal import CONFIDENT
from diffusers_sae.demo.measure_steering import edits_towards, judged, load_towards, silent_scenes, steering_rows
from diffusers_sae.demo.quality import fingerprint
from diffusers_sae.demo.shipped import (
    CALL,
    MODELS,
    SITES,
    generate,
    load_detectors,
    load_judge,
    load_pipeline,
    load_scores,
    look,
)
from diffusers_sae.demo.world import CONCEPTS, OBJECTS, Scene, concept_name, grid
from diffusers_sae.evaluation.ledger import Ledger
from diffusers_sae.evaluation.rows import Rows, pooled

SEED = 90_000_000
BRANCHES = ("cond", "uncond", "both", "contrast")
BRANCH_CONCEPTS = ("neon", "ink", "3d", "red background", "black background", "rocket", "cactus", "hamburger")
MASK_CONCEPTS = ("black background", "red background", "green background", "yellow background", "blue background")
STARTS = (0.0, 0.2, 0.4, 0.6)
TUNED = ("panda", "rocket", "hamburger", "cook")
REMOVED = tuple(name for name in OBJECTS if name not in TUNED)


class Setting(NamedTuple):
    """`latents` of each of the `sites` at a timestep, on a branch; `value` is the factor or the bound."""

    value: float
    latents: int
    branch: str
    sites: tuple[str, ...] = SITES


REMOVALS = {
    "scale": (
        *(Setting(value, 8, "cond") for value in (-1.0, -1.5, -2.0)),
        *(Setting(value, 8, "both") for value in (-1.5, -2.0, -3.0)),
    ),
    "replace": tuple(Setting(0.25, latents, "both", SITES[:1]) for latents in (2, 3, 5)),
}
"""Chosen on the objects in `TUNED`, whose images may have begun from the same noise."""


class Choices:
    """The embedded model with its SAEs, and a ledger of what was measured; with `few`, of one of each kind only."""

    def __init__(self, work: Path, few: bool = False) -> None:
        self._most, self._most_scenes = (1, 4) if few else (None, None)
        self._pipe, self._judge = load_pipeline(), load_judge()
        self._scores, self._detectors = load_scores(), load_detectors()
        for site in SITES:
            self._pipe.load_sae(MODELS / "saes" / site, adapter_name=site)
        self._ledger = Ledger(work / "choices.jsonl", fingerprint())

    def branches(self, images: int) -> dict[str, Any]:
        """Shares of images that show the concept and keep all else, by the branch that is edited.

        The same images are steered towards all concepts of a factor.
        """
        towards, found = load_towards(), {}
        for branch in BRANCHES[: self._most]:
            each: dict[str, Rows] = {}
            for concept in tqdm(BRANCH_CONCEPTS[: self._most], desc=branch):
                scenes = silent_scenes(CONCEPTS[concept], images, SEED)

                def seen(scenes: Any = scenes) -> list[Any]:
                    return judged(self._pipe, self._judge, scenes, SEED)

                bare = self._ledger.get(f"bare {CONCEPTS[concept]} {images}", seen)
                edits = edits_towards(self._scores, concept, towards[concept])
                work = partial(self._steered, edits, seen, branch=branch)
                steered = self._ledger.get(f"{branch} {concept} {images}", work)
                each[concept] = steering_rows(concept, scenes, bare, steered)
            mean = {share: pooled(each.values(), share).as_dict() for share in ("seen", "kept")}
            found[branch] = {"mean": mean, "concepts": {concept: rows.figures() for concept, rows in each.items()}}
        return found

    def masks(self, images: int) -> list[dict[str, Any]]:
        """Which half of the background turns, for a mask over the left half, by when the edits begin.

        The judge sees each half together with its mirror image, as a whole picture. Images of which a half has the
        background already say nothing about it and are left out of that half's shares.
        """
        mask = torch.zeros(64, 64)
        mask[:, :32] = 1
        towards, found = load_towards(), []
        for start in STARTS[: self._most]:
            each: dict[str, Rows] = {}
            for concept in tqdm(MASK_CONCEPTS[: self._most], desc=f"masks from {start}"):
                prompts = [s.caption() for s in silent_scenes("background", images, SEED)]

                def halves(prompts: list[str] = prompts) -> list[list[str]]:
                    return self._backgrounds(list(generate(self._pipe, prompts, range(SEED, SEED + images))))

                bare = self._ledger.get(f"bare halves {images}", halves)
                edits = edits_towards(self._scores, concept, towards[concept])
                work = partial(self._steered, edits, halves, mask=mask, start=start, stop=1.0)
                seen = self._ledger.get(f"halves {start} {concept} {images}", work)
                each[concept] = _halves_turned(concept, seen, bare)
            shares = {name: pooled(each.values(), name).as_dict() for name in next(iter(each.values())).columns}
            found.append(
                {"start": start, **shares, "rows": {concept: rows.as_dict() for concept, rows in each.items()}}
            )
        return found

    def _backgrounds(self, images: list[torch.Tensor]) -> list[list[str]]:
        """The background of the left and of the right half of each image `(3, 64, 64)`."""
        left, right = torch.stack(images).chunk(2, -1)
        names = []
        for half in (torch.cat([left, left.flip(-1)], -1), torch.cat([right.flip(-1), right], -1)):
            names.append([concept_name("background", seen["background"][0]) for seen in look(self._judge, half)])
        return [list(each) for each in zip(*names, strict=True)]

    def removal(self) -> dict[str, Any]:
        """Removal by `scale` and by `replace`, with the same latents under the same rule, as curves.

        `ua`: share of images no longer seen as the object. `background_where_removed`: share of those that keep their
        background. `damaged`: share of images in which style or background
        could be named with confidence, and now cannot, or is another. The object is left out of that, since it is
        what should go. `background` and `style`: shares of images that keep theirs.
        """
        found: dict[str, Any] = {}
        flags: dict[str, list[torch.Tensor]] = {}  # (settings, images, FLAGS)
        for mode, settings in REMOVALS.items():
            found[mode], flags[mode] = [], []
            for setting in settings:
                judged = self._judged_removals(mode, setting)
                flags[mode].append(torch.tensor(judged).double())  # (images, FLAGS)
                found[mode].append({**setting._asdict(), **_removal_rows(judged).figures()})
        found["at_equal_ua"] = [
            {
                "latents": setting.latents,
                "ua": float(replaced[:, 0].mean()),
                "less_damaged": _gain(replaced, flags["scale"], FLAGS.index("damaged"), -1),
                "more_backgrounds": _gain(replaced, flags["scale"], FLAGS.index("background"), 1),
            }
            for setting, replaced in zip(REMOVALS["replace"], flags["replace"], strict=True)
        ]
        return found

    def _judged_removals(self, mode: str, setting: Setting) -> list[list[bool]]:
        """`FLAGS` of every image whose bare one shows the object."""
        found = []
        for target in tqdm(REMOVED[: self._most], desc=f"{mode} {setting}"):
            scenes = [s for s in grid() if s.object == target][: self._most_scenes]
            bare = self._ledger.get(f"bare object {target}", partial(self._look, scenes))
            edits = [self._removal_edit(site, target, mode, setting) for site in setting.sites]
            work = partial(self._steered, edits, partial(self._look, scenes))
            seen = self._ledger.get(f"{mode} {setting} {target}", work)
            pairs = zip(bare, seen, strict=True)
            found += [_flags(target, before, after) for before, after in pairs if before["object"][0] == target]
        return found

    def _look(self, scenes: list[Scene]) -> list[dict[str, Any]]:
        """What the judge sees in an image of each scene: value and confidence of every factor."""
        seeds = range(SEED, SEED + len(scenes))
        return list(look(self._judge, list(generate(self._pipe, [s.caption() for s in scenes], seeds))))

    def _removal_edit(self, site: str, target: str, mode: str, setting: Setting) -> dict[str, Any]:
        scores, by = self._scores[site], "activity"
        edit = {
            "mode": mode,
            "adapter_name": site,
            "branch": setting.branch,
            "when": self._detectors.rule(target, SITES[0]),
        }
        percentile = 100 * (1 - setting.latents / scores.n_latents)
        if mode == "scale":
            return {"features": scores.away(target, setting.value, percentile, by), **edit}
        # bounds as multiples of what the latents are on images of the concept
        chosen = scores.choose(target, percentile, by)
        bound = scores.activity[scores.index(target)] * setting.value
        return {"features": scores.tables(chosen, bound, otherwise=1e9), **edit}

    def _steered(self, edits: list[dict[str, Any]], work: Any, **extra: Any) -> Any:
        try:
            for edit in edits:
                self._pipe.steer(**{**edit, **extra})
            return work()
        finally:
            self._pipe.reset_steering()


FLAGS = ("ua", "damaged", "background", "style")


def _halves_turned(concept: str, seen: list[list[str]], bare: list[list[str]]) -> Rows:
    """Of each image's halves, those that have the background now, of those that had another."""
    columns: dict[str, list[bool | None]] = {"left_turned": [], "right_turned": [], "right_as_before": []}
    for (left, right), (old_left, old_right) in zip(seen, bare, strict=True):
        columns["left_turned"].append(None if old_left == concept else left == concept)
        columns["right_turned"].append(None if old_right == concept else right == concept)
        columns["right_as_before"].append(None if old_right == concept else right == old_right)
    return Rows(range(len(seen)), columns)


def _removal_rows(judged: list[list[bool]]) -> Rows:
    columns: dict[str, list[bool | None]] = {name: [row[i] for row in judged] for i, name in enumerate(FLAGS)}
    pairs = zip(columns["ua"], columns["background"], strict=True)
    columns["background_where_removed"] = [kept if removed else None for removed, kept in pairs]
    return Rows(range(len(judged)), columns)


def _flags(target: str, before: dict[str, Any], after: dict[str, Any]) -> list[bool]:
    """What `FLAGS` are of one image."""
    kept, damaged = {}, False
    for factor in ("background", "style"):
        (was, sure), (now, still_sure) = before[factor], after[factor]
        kept[factor] = now == was
        damaged |= sure >= CONFIDENT and (still_sure < CONFIDENT or now != was)
    return [after["object"][0] != target, damaged, kept["background"], kept["style"]]


def _gain(
    replaced: torch.Tensor, scaled: list[torch.Tensor], column: int, sign: int, draws: int = 2000
) -> dict[str, float]:
    """By how much a flag's share is better than by scaling at the same UA, with the 95 % interval over drawn images.

    Flags are `(images, FLAGS)`. The curve of scaling is the best line between two of its settings.
    """

    def gain(images: torch.Tensor) -> float:
        def point(flags: torch.Tensor) -> tuple[float, float]:
            return float(flags[images, 0].mean()), sign * float(flags[images, column].mean())

        ua, ours = point(replaced)
        points = [point(each) for each in scaled]
        below, above = [p for p in points if p[0] <= ua], [p for p in points if p[0] > ua]
        lines = [(d + (ua - u) * (e - d) / (v - u)) for u, d in below for v, e in above]
        return ours - max(lines or [d for _, d in points])

    images = np.arange(len(replaced))
    interval = bootstrap(
        (images,), lambda drawn: gain(torch.from_numpy(drawn)), vectorized=False, n_resamples=draws,
        method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {"value": gain(torch.from_numpy(images)), "low": float(interval.low), "high": float(interval.high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path("outputs/choices"))
    args = parse(parser, "steering_choices.json", images=2)
    if args.smoke:
        CALL["num_inference_steps"] = 4  # of everything that generates
    choices = Choices(args.work, few=args.smoke)
    figures = {
        "masks": choices.masks(args.images),
        "branches": choices.branches(args.images),
        "removal": choices.removal(),
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({"masks": figures["masks"], "branches": {b: f["mean"] for b, f in figures["branches"].items()}}))


if __name__ == "__main__":
    main()
