"""Does the kind of the SAE matter for steering? `python benchmarks/kinds_steering.py`.

Trains TopK, BatchTopK and Matryoshka SAEs of both of the demo's sites on the same activations in one pass, scores the
same concepts with each, and steers the same images towards them at two strengths. The shares are those by which the
shipped SAEs are judged, and the budget is a part of theirs. Writes `benchmarks/results/kinds_steering.json`; a
stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import parse

from diffusers_sae.demo.measure_steering import Towards, edits_towards, judged, silent_scenes, steering_rows
from diffusers_sae.demo.shipped import CALL, SITES, load_judge, load_pipeline
from diffusers_sae.demo.world import BACKGROUNDS, CONCEPTS, STYLES, THINGS, concept_name, sample_captions, sample_scene
from diffusers_sae.evaluation.ledger import Ledger
from diffusers_sae.evaluation.rows import pooled
from diffusers_sae.features.concepts import concept_activity
from diffusers_sae.saes import BatchTopKSAE, MatryoshkaSAE, SparseAutoencoder, TopKSAE
from diffusers_sae.training import StreamedSAE, StreamingConfig, train_on_stream

KINDS = {"TopK": TopKSAE, "BatchTopK": BatchTopKSAE, "Matryoshka": MatryoshkaSAE}
LATENTS, K, SEED = 1024, 32, 85_000_000
STEERED = {
    "object": (Towards(SITES, stop=0.6), THINGS[::6]),
    "style": (Towards(stop=0.6), STYLES[::2]),
    "background": (Towards(SITES, stop=0.3), BACKGROUNDS[::2]),
}
"""How images are steered towards the values of a factor, but for the strength, and towards which values."""
STRENGTHS = {"object": (1.25, 1.7), "style": (2.5, 3.4), "background": (1.0, 1.35)}


def new_sae(cls: Any, width: int) -> SparseAutoencoder:
    return cls(width, LATENTS, K)


def trained(pipe: Any, images: int, folder: Path) -> dict[str, dict[str, SparseAutoencoder]]:
    """`{kind: {site: SAE}}`, all from one pass over `images` generations."""
    torch.manual_seed(0)
    saes = {f"{kind} {site}": StreamedSAE(site, partial(new_sae, cls)) for kind, cls in KINDS.items() for site in SITES}
    config = StreamingConfig(images, 32, rows=512, reuse=2.0)
    found = train_on_stream(pipe, saes, sample_captions(images, seed=SEED), config, folder, **CALL)
    return {kind: {site: found[f"{kind} {site}"].eval() for site in SITES} for kind in KINDS}


def reconstruction_at_the_end(folder: Path) -> dict[str, dict[str, float]]:
    """FVU and L0 of every SAE over its last training batches."""
    logs = {name: folder / f"{name}.jsonl" for name in (f"{kind} {site}" for kind in KINDS for site in SITES)}
    last = {name: json.loads(log.read_text().splitlines()[-1]) for name, log in logs.items()}
    return {name: {key: one[key] for key in ("fvu", "l0") if key in one} for name, one in last.items()}


def steering(
    pipe: Any, saes: dict[str, SparseAutoencoder], scores: Any, ledger: Ledger, kind: str, images: int, most: int | None
) -> Any:
    """`{factor: {strength: shares over all its concepts}}`; over the first `most` concepts, if that is given."""
    judge = load_judge()
    for site, sae in saes.items():
        pipe.load_sae(sae, site=site, adapter_name=site)
    found: dict[str, Any] = {}
    for factor, (how, values) in STEERED.items():
        found[factor] = {}
        scenes = silent_scenes(factor, images, SEED)
        bare = ledger.get(f"bare {factor} {images}", partial(judged, pipe, judge, scenes, SEED))
        for strength in STRENGTHS[factor]:
            rows = {}  # the same images are steered towards every concept
            for value in values[:most]:
                concept = concept_name(factor, value)
                for edit in edits_towards(scores, concept, how._replace(strength=strength)):
                    pipe.steer(**edit)
                seen = ledger.get(f"{kind} {concept} {strength} {images}", partial(judged, pipe, judge, scenes, SEED))
                pipe.reset_steering()
                rows[concept] = steering_rows(concept, scenes, bare, seen)
            shares = {name: pooled(rows.values(), name).as_dict() for name in ("seen", "kept")}
            found[factor][str(strength)] = {**shares, "rows": {c: each.as_dict() for c, each in rows.items()}}
            print(kind, factor, strength, shares, flush=True)
    pipe.unload_sae()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640, help="that the SAEs are trained on")
    parser.add_argument("--concept-images", type=int, default=256)
    parser.add_argument("--steered", type=int, default=16, help="images a concept")
    parser.add_argument("--work", type=Path, default=Path("outputs/kinds_steering"))
    parser.set_defaults(values=None)
    args = parse(parser, "kinds_steering.json", images=4, concept_images=176, steered=1, values=1)
    if args.smoke:
        CALL["num_inference_steps"] = 2  # of everything that generates
    pipe = load_pipeline()
    every = trained(pipe, args.images, args.work)
    figures: dict[str, Any] = {
        **{name: getattr(args, name) for name in ("images", "concept_images", "steered")},
        "latents": LATENTS, "k": K, "hardware": f"{os.cpu_count()} cores",
        "while training": reconstruction_at_the_end(args.work), "kinds": {},
    }  # fmt: skip
    rng = random.Random(SEED)
    scenes = [sample_scene(rng) for _ in range(args.concept_images)]
    labelled = [(scene.caption(i), scene.concepts()) for i, scene in enumerate(scenes)]
    ledger = Ledger(args.work / "steering.jsonl", {"images": str(args.images), "concepts": str(args.concept_images)})
    for kind, saes in every.items():
        scores = concept_activity(pipe, saes, labelled, CONCEPTS, batch_size=32, seed=SEED, **CALL)
        figures["kinds"][kind] = steering(pipe, saes, scores, ledger, kind, args.steered, args.values)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
