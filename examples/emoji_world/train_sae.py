"""Train TopK SAEs on emoji-sd: `python train_sae.py`. Writes `saes/<site>`: weights, statistics, scores, figures.

Activations of the cond branch at every timestep flow from the running pipeline through a shuffle buffer for each
site; nothing is dumped, and all sites are trained in one pass. A stopped run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loop import keep_freed_memory

from diffusers_sae import Site, TopKSAE
from diffusers_sae.capture import stream_activations
from diffusers_sae.demo.shipped import GUIDANCE, SITES, STEPS, load_pipeline
from diffusers_sae.demo.world import CONCEPTS, Scene, concept_name, sample_caption, sample_scene
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter
from diffusers_sae.features.concepts import ConceptScores, concept_activity
from diffusers_sae.features.effects import concept_effect
from diffusers_sae.saes import SparseAutoencoder, StatisticsAccumulator
from diffusers_sae.saes.checksums import write_checksums
from diffusers_sae.training import StreamingConfig, train_on_stream

CALL = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
HELD_OUT_SEED, CONCEPT_SEED, EFFECT_SEED = 10_000_000, 20_000_000, 30_000_000


def captions(count: int, seed: int) -> Iterator[str]:
    """Captions in which factors are left out at times, as in the training of the U-Net."""
    rng = random.Random(seed)
    return (sample_caption(sample_scene(rng), rng) for _ in range(count))


def new_sae(width: int, site: str, args: argparse.Namespace) -> TopKSAE:
    origin = {
        "site": {"path": site, "kind": "output", "stream": "image", "layout": "positions"},
        "base_model": "emoji-sd",
        "branch": "cond",
        "scheduler": "DDIMScheduler",
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "resolution": 64,
        "training_images": args.images,
    }
    return TopKSAE(width, args.latents, args.k, provenance=origin)


def examine(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], args: argparse.Namespace
) -> tuple[dict[str, dict], dict[str, StatisticsAccumulator]]:
    """Reconstruction figures and statistics on images that were not trained on."""
    meters = {site: ReconstructionMeter(sae) for site, sae in saes.items()}
    accumulators = {site: StatisticsAccumulator(sae.n_latents) for site, sae in saes.items()}
    prompts = captions(args.held_out, HELD_OUT_SEED)
    for batch in stream_activations(pipe, list(saes), prompts, batch_size=args.batch, seed=HELD_OUT_SEED, **CALL):
        for site, sae in saes.items():
            for rows, timestep in zip(*batch.rows(site), strict=True):
                meters[site].add(float(timestep), rows)
                accumulators[site].add(float(timestep), sae.encode_sparse(rows))
    return {site: meter.figures() for site, meter in meters.items()}, accumulators


def effects_on(pipe: Any, sae: SparseAutoencoder, site: str, concept: str, factor: str, images: int) -> torch.Tensor:
    """`(T, n)`: effect of every latent towards a concept, over scenes that differ in it alone."""
    rng = random.Random(EFFECT_SEED)
    value = concept[: -len(suffix)] if (suffix := concept_name(factor, "")) else concept
    scenes = [_with(factor, value, rng) for _ in range(images)]
    prompts = [s.caption() for s in scenes]
    neutral = [replace(s, **{factor: None}).caption() for s in scenes]
    return concept_effect(pipe, sae, Site(site), prompts, neutral, seed=EFFECT_SEED, **CALL)[0]


def _with(factor: str, value: str, rng: random.Random) -> Scene:
    """A random scene with this value, of a kind that can have it."""
    while True:
        scene = sample_scene(rng)
        if factor in ("gender", "skin") and not scene.is_person:
            continue
        if factor == "object" and scene.object != value:
            continue
        scene = replace(scene, **{factor: value})
        if scene.labels()[factor] >= 0:
            return scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"))
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--concept-images", type=int, default=1792)
    parser.add_argument("--effect-images", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--reuse", type=float, default=2.0)
    args = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    pipe = load_pipeline(args.world / "emoji-sd")
    makers = {site: lambda width, site=site: new_sae(width, site, args) for site in SITES}
    config = StreamingConfig(args.images, args.batch, reuse=args.reuse)
    saes = train_on_stream(pipe, makers, captions(args.images, 0), config, args.world / "training" / "sae", **CALL)
    figures, statistics = examine(pipe, saes, args)
    rng = random.Random(CONCEPT_SEED)
    scenes = [sample_scene(rng) for _ in range(args.concept_images)]
    labelled = [(scene.caption(i), scene.concepts()) for i, scene in enumerate(scenes)]
    scores = concept_activity(pipe, saes, labelled, CONCEPTS, batch_size=args.batch, seed=CONCEPT_SEED, **CALL)
    for site, sae in saes.items():
        scores[site].effect = torch.stack(
            [effects_on(pipe, sae, site, concept, factor, args.effect_images) for concept, factor in CONCEPTS.items()]
        )
        save(sae, statistics[site], scores[site], figures[site], args.world / "saes" / site)


def save(
    sae: SparseAutoencoder, statistics: StatisticsAccumulator, scores: ConceptScores, figures: dict, folder: Path
) -> None:
    """Everything about one SAE, with checksums."""
    sae.save_pretrained(folder)
    statistics.finish().save(folder)
    scores.save(folder)
    (folder / "held_out.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_checksums(folder)
    print(folder, {k: v for k, v in figures.items() if k != "fvu_by_timestep"})


if __name__ == "__main__":
    main()
