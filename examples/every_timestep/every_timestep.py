"""Concepts at every timestep of a U-Net block: which latents carry them when, and removal. See README.md here.

python examples/every_timestep/every_timestep.py
python examples/every_timestep/every_timestep.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --sae folder --concepts concepts.json --device cuda
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_sae import SAESteeringPipeline, load_sae
from diffusers_sae.demo.measure_removal import REMOVAL, edits_away
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import CALL, MODELS, SITES, load_detectors, load_judge, load_scores, look
from diffusers_sae.demo.world import CONCEPT_VALUES, CONCEPTS, Scene, sample_scene, scene_with
from diffusers_sae.evaluation.rows import Rows
from diffusers_sae.evaluation.shares import Share
from diffusers_sae.features.concepts import ConceptScores, concept_activity

SEED = 93_000
TARGETS = ("panda", "rocket", "neon", "pencil sketch", "red background")
WINDOWS = {
    "all steps": (0.0, 1.0),
    "first third": (0.0, 0.35),
    "second third": (0.35, 0.7),
    "last third": (0.7, 1.0),
}
Labelled = list[tuple[str, tuple[str, ...]]]
"""Prompts, each with the concepts that its image shows."""

SMOKE = argparse.Namespace(images=64, each=1, targets=("neon",))


class Asked(NamedTuple):
    """Prompts that ask for each concept; of the demo's world, what else they ask for, and who looks."""

    prompts: dict[str, list[str]]
    scenes: dict[str, list[Scene]]
    judge: Any


def of_the_demo(count: int) -> tuple[Labelled, dict[str, str]]:
    rng = random.Random(SEED)
    scenes = [sample_scene(rng) for _ in range(count)]
    labelled = [(scene.caption(i), scene.concepts()) for i, scene in enumerate(scenes)]
    shown = {concept for _, concepts in labelled for concept in concepts}
    return labelled, {name: group for name, group in CONCEPTS.items() if name in shown}


def of_a_file(file: Path) -> tuple[Labelled, dict[str, str]]:
    """`{"panda": ["a photo of a panda", ...], ...}`: concepts, which are told apart from each other, and prompts."""
    found = json.loads(file.read_text())
    if not isinstance(found, dict) or len(found) < 2 or not all(isinstance(p, list) and p for p in found.values()):
        raise SystemExit(f"{file} must hold two or more concepts, each with a list of prompts.")
    return [(prompt, (name,)) for name, prompts in found.items() for prompt in prompts], dict.fromkeys(found, "concept")


def over_time(scores: ConceptScores, concept: str, percentile: float) -> dict[str, Any]:
    """How many latents carry a concept at any step, and the Jaccard index of those of two steps."""
    chosen = scores.choose(concept, percentile)  # (T, n)

    def alike(a: torch.Tensor, b: torch.Tensor) -> float:
        return round(float((a & b).sum() / (a | b).sum().clamp(min=1)), 3)

    half = len(chosen) // 2
    return {
        "latents a step": round(float(chosen.sum(1).float().mean()), 1),
        "latents at any step": int(chosen.any(0).sum()),
        "next steps alike": round(sum(alike(a, b) for a, b in pairwise(chosen)) / (len(chosen) - 1), 3),
        "first and middle step alike": alike(chosen[0], chosen[half]),
        "first and last step alike": alike(chosen[0], chosen[-1]),
    }


def draw_over_time(scores: ConceptScores, concepts: Sequence[str], file: Path, most: int = 14) -> None:
    """A map for each concept: importance of its most important latents at every step, each in shares of its largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(concepts), figsize=(3.1 * len(concepts), 3.6), layout="constrained", squeeze=False
    )
    for axis, concept in zip(axes[0], concepts, strict=True):
        importance = scores.importance(concept).clamp(min=0)  # (T, n)
        top = importance.amax(0).topk(most).indices
        top = top[importance[:, top].argmax(0).argsort()]  # the early ones first
        rows = importance[:, top].T / importance[:, top].amax(0)[:, None]
        axis.imshow(rows, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(concept)
        axis.set_yticks(range(most), [str(int(j)) for j in top], fontsize=7)
        steps = scores.timesteps.tolist()
        axis.set_xticks([0, len(steps) - 1], [f"t = {steps[0]:.0f}", f"t = {steps[-1]:.0f}"])
    axes[0, 0].set_ylabel("latent")
    figure.suptitle("Importance for each timestep, in shares of a latent's largest", fontweight="bold")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plans_for(site: str, scores: ConceptScores, concept: str, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Nothing; the paper's plan; the same at each part of the time with a milder factor; the demo's own."""
    plans: dict[str, list[dict]] = {"bare": []}
    paper = scores.away(concept, args.gamma, args.percentile)
    plans[f"gamma {args.gamma:g}"] = [{"features": paper, "mode": "scale", "adapter_name": site}]
    mild = scores.away(concept, args.mild, args.percentile)
    for name, (start, stop) in WINDOWS.items():
        edit = {"features": mild, "mode": "scale", "adapter_name": site, "start": start, "stop": stop}
        plans[f"gamma {args.mild:g}, {name}"] = [edit]
    if args.model is None:
        kind = "object" if CONCEPTS[concept] == "object" else "style"
        plans["the demo's plan"] = edits_away(load_scores(), load_detectors(), concept, REMOVAL[kind])
    return plans


def measured(judge: Any, images: torch.Tensor, scenes: Sequence[Scene], concept: str) -> dict[str, Any]:
    """UA: the concept is not seen; kept: the other two factors are, which are two judgements of one image."""
    factor, seen = CONCEPTS[concept], look(judge, list(2 * images - 1))
    right: dict[str, list[bool]] = {
        f: [verdict[f][0] == getattr(scene, f) for scene, verdict in zip(scenes, seen, strict=True)]
        for f in ("object", "style", "background")
    }
    removed = [not hit for hit in right.pop(factor)]
    rows = Rows(range(len(scenes)), {"removed": removed, **right})
    kept = sum((rows.share(other) for other in right), Share())
    return {"removed": rows.share("removed").as_dict(), "the rest kept": kept.as_dict(), "rows": rows.as_dict()}


def removed(
    pipe: Any, plans: Mapping[str, list[dict]], concept: str, asked: Asked, call: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Images of prompts that ask for the concept, under each plan, and what the judge sees in them."""
    prompts, images, told = asked.prompts[concept], {}, {}
    for name, plan in plans.items():
        pipe.reset_steering()
        for edit in plan:
            pipe.steer(**edit)
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(prompts))]
        images[name] = pipe(prompts, generator=generators, output_type="pt", **call).images.float()
        if concept in asked.scenes:
            told[name] = measured(asked.judge, images[name], asked.scenes[concept], concept)
    pipe.reset_steering()
    return images, told


def asked_of_the_demo(each: int, targets: Sequence[str]) -> Asked:
    rng = random.Random(SEED + 1)
    scenes = {c: [scene_with(CONCEPTS[c], CONCEPT_VALUES[c], rng) for _ in range(each)] for c in targets}
    return Asked({c: [scene.caption() for scene in found] for c, found in scenes.items()}, scenes, load_judge())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a pipeline; by default the emoji-sd that ships")
    parser.add_argument("--sae", help="folder, file or hub name of an SAE; by default that of the first shipped site")
    parser.add_argument("--site", help="of the SAE, if it does not say")
    parser.add_argument("--concepts", type=Path, help="JSON of concepts with prompts, for another model")
    parser.add_argument("--images", type=int, default=128, help="of the demo's world, to score concepts with")
    parser.add_argument("--each", type=int, default=8, help="images a concept and plan")
    parser.add_argument("--gamma", type=float, default=-20.0, help="the paper's factor")
    parser.add_argument("--mild", type=float, default=-1.0)
    parser.add_argument("--percentile", type=float, default=99.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("every-timestep-out"))
    parser.set_defaults(targets=TARGETS)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    if args.model is not None and (args.sae is None or args.concepts is None):
        parser.error("--model needs --sae and --concepts.")
    if args.smoke:
        CALL["num_inference_steps"] = 4  # of everything that generates
    begin, busy = time.perf_counter(), time.process_time()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = SAESteeringPipeline.from_pretrained(args.model or MODELS / "emoji-sd", dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    call = CALL if args.model is None else {}
    sae = load_sae(args.sae or MODELS / "saes" / SITES[0])
    site = args.site or sae.provenance["site"]["path"]
    labelled, groups = of_the_demo(args.images) if args.model is None else of_a_file(args.concepts)
    scores = concept_activity(pipe, {site: sae}, labelled, groups, seed=SEED, **call)[site]
    pipe.load_sae(sae, site=site, adapter_name=site)
    if args.model is None:
        pipe.load_sae(MODELS / "saes" / SITES[1], adapter_name=SITES[1])
        asked = asked_of_the_demo(args.each, args.targets)
    else:
        asked = Asked({c: [p for p, shown in labelled if c in shown][: args.each] for c in list(groups)[:5]}, {}, None)
    draw_over_time(scores, list(asked.prompts), args.out / "over_time.png")
    told: dict[str, Any] = {"over time": {c: over_time(scores, c, args.percentile) for c in groups}, "removal": {}}
    rows = []
    for concept in asked.prompts:
        images, seen = removed(pipe, plans_for(site, scores, concept, args), concept, asked, call)
        told["removal"][concept] = seen
        shares = {name: (each["removed"]["value"], each["the rest kept"]["value"]) for name, each in seen.items()}
        print(concept, json.dumps(shares), flush=True)
        captions = list(images) if not rows else [""] * len(images)
        rows.append(Row(f"without: {concept}", [2 * each[0] - 1 for each in images.values()], captions))
    title = f"Latents above the {args.percentile:g}th percentile of their timestep, scaled"
    draw_grid(rows, title, args.out / "removed.png")
    told["seconds"] = {"whole": round(time.perf_counter() - begin), "of processor": round(time.process_time() - busy)}
    told["threads"] = torch.get_num_threads()
    (args.out / "figures.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
