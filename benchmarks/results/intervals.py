"""Gives results that were measured before rows were kept the intervals of their numbers of distinct images.

Those files count an image once per target or factor that it was judged for. `judgements` keeps that number; the
interval is Wilson's for the number of distinct `images`. Artefacts of that time are counted over all images, the
removed factor included, which `counts` says; `artefacts_edited` divides the same ones by the number of edited images.
Shares of results measured since then say how their interval was made, and stay as they are.

    python benchmarks/results/intervals.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_sae.demo import measure_steering
from diffusers_sae.demo.measure_removal import SEED, cells_of
from diffusers_sae.demo.pictures import draw_curves
from diffusers_sae.demo.quality import CURVE_TARGETS
from diffusers_sae.demo.world import CONCEPTS, THINGS, grid
from diffusers_sae.evaluation.shares import wilson

RESULTS = Path(__file__).parent
METHOD = "Wilson, distinct images"
GRID = len(grid())
COUNTS = "all images, the removed factor included"

Share = dict[str, Any]


def over_images(share: Share, images: int, **more: str) -> Share:
    """The share with the interval of so many distinct images."""
    if share.get("interval", METHOD) != METHOD:
        return share
    judgements = share.get("judgements", share["images"])
    return {**_share(round(share["value"] * judgements), judgements, images), **more}


def _share(hits: int, judgements: int, images: int) -> Share:
    low, high = wilson(hits / judgements, images)
    numbers = {"value": round(hits / judgements, 4), "low": round(low, 4), "high": round(high, 4)}
    return {**numbers, "images": images, "judgements": judgements, "interval": METHOD}


def demo_quality(figures: dict[str, Any]) -> None:
    for steered in figures["steering"].values():
        steered.setdefault("seed", measure_steering.SEED)
        steered.setdefault("tuning_seed", measure_steering.TUNING_SEED)
    for domain, other in (("style", "object"), ("object", "style")):
        part = figures[f"{domain}s"]
        if any("rows" in target for target in part["targets"].values()):
            continue
        part["ira"], part["cra"] = (over_images(part[name], GRID) for name in ("ira", "cra"))
        part["artefacts"] = over_images(part["artefacts"], GRID, counts=COUNTS)
        judgements = [target["artefacts"] for target in part["targets"].values()]
        artefacts = sum(_hits(share) for share in judgements)
        found, false_alarms = (
            sum(_hits(target[name]) for target in part["targets"].values()) for name in ("found", "false_alarms")
        )
        # a cell has one value of the domain, so that cells found right are distinct; the few false alarms may not be
        part["artefacts_edited"] = {
            **_share(artefacts, found + false_alarms, found),
            "counts": "edited images, the removed factor included",
        }
        part["edited"] = _share(found + false_alarms, sum(share["images"] for share in judgements), GRID)
        part["ira_bare"], part["cra_bare"] = figures["bare"][domain], figures["bare"][other]
        part["seed"] = part["tuning_seed"] = SEED
        for points in figures["curves"][domain].values():
            for point in points:
                _curve_point(point, domain)


def _curve_point(point: dict[str, Any], domain: str) -> None:
    chosen = {target: cells_of(target, 8) for target in CURVE_TARGETS[domain]}
    every = {i for cells in chosen.values() for i, _ in cells}
    others = {i for t, cells in chosen.items() for i, scene in cells if getattr(scene, CONCEPTS[t]) != t}
    point["ira"], point["cra"] = over_images(point["ira"], len(others)), over_images(point["cra"], len(every))
    point["artefacts"] = over_images(point["artefacts"], len(every), counts=COUNTS)


def text_encoder(figures: dict[str, Any]) -> None:
    removal = figures["removal"]
    chosen = {target: cells_of(target, 16) for target in removal["targets"]}
    every = {i for cells in chosen.values() for i, _ in cells}
    others = {i for t, cells in chosen.items() for i, scene in cells if scene.object != t}
    for name in ("bare", "text", "U-Net"):
        part = removal[name]
        if "rows" not in part:
            part["ira"], part["cra"] = over_images(part["ira"], len(others)), over_images(part["cra"], len(every))
            part["artefacts"] = over_images(part["artefacts"], len(every), counts=COUNTS)
    if "interval" not in figures["selective"]["not named"]:
        figures["selective"]["not named"]["distinct images"] = len(_other_images(removal["targets"]))


def _other_images(targets: list[str]) -> set[tuple[int, str]]:
    """Prompts that do not name the target, each with its seed, as `examples/text_encoder` takes them."""
    others = [[t for t in THINGS if t != target][: 2 * len(targets) : 3] for target in targets]
    return {pair for each in others for pair in enumerate(each)}


def every_timestep(figures: dict[str, Any]) -> None:
    for plans in figures["removal"].values():
        for seen in plans.values():
            seen["the rest kept"] = over_images(seen["the rest kept"], seen["removed"]["images"])


def kandinsky(figures: dict[str, Any]) -> None:
    for name in ("embeddings of the prior", "embeddings seen anew"):
        for factor in ("object", "style", "background"):
            for key, told in figures["transfer"][name][factor].items():
                if key != "features":
                    told["kept"] = over_images(told["kept"], told["moved"]["images"])
    for name in ("no ban", "ban", "ban where a cat is"):
        ban = figures["bans"][name]
        images = ban["red, cats"]["images"] + ban["red, others"]["images"]
        ban["object and style kept"] = over_images(ban["object and style kept"], images)


def kinds_steering(figures: dict[str, Any]) -> None:
    for factors in figures["kinds"].values():
        for strengths in factors.values():
            for told in strengths.values():
                for name in ("seen", "kept"):
                    told[name] = over_images(told[name], figures["steered"])


def steering_choices(figures: dict[str, Any]) -> None:
    for told in figures["masks"]:
        for name, share in told.items():
            if name not in ("start", "rows"):
                told[name] = over_images(share, 8)  # its `--images`: each is steered towards five backgrounds


FILES: dict[str, Callable[[dict[str, Any]], None]] = {
    f.__name__: f for f in (demo_quality, text_encoder, every_timestep, kandinsky, kinds_steering, steering_choices)
}


def _hits(share: Share) -> int:
    return round(share["value"] * share["images"])


def main() -> None:
    for name, amend in FILES.items():
        file = RESULTS / f"{name}.json"
        figures = json.loads(file.read_text())
        amend(figures)
        file.write_text(json.dumps(figures, indent=1) + "\n")
        if name == "demo_quality":
            draw_curves(figures["curves"], RESULTS / "demo_removal.png")


if __name__ == "__main__":
    main()
