"""Train TopK SAEs on emoji-sd: `python train_sae.py`. Writes `saes/<site>`: weights, statistics, scores, figures.

Activations of the cond branch at every timestep flow from the running pipeline through a shuffle buffer for each
site; nothing is dumped, and all sites are trained in one pass. A stopped run goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffusers_sae import Site, TopKSAE
from diffusers_sae.checksums import write_checksums
from diffusers_sae.demo.measure_sae import reconstruction
from diffusers_sae.demo.shipped import CALL, GUIDANCE, SITES, STEPS, load_pipeline
from diffusers_sae.demo.world import CONCEPT_VALUES, CONCEPTS, leave_out, sample_captions, sample_scene, scene_with
from diffusers_sae.features.concepts import ConceptScores, concept_activity
from diffusers_sae.features.detectors import ConceptDetectors, concept_detectors
from diffusers_sae.features.effects import concept_effect
from diffusers_sae.saes import LatentStatistics, SparseAutoencoder
from diffusers_sae.training import StreamingConfig, train_on_stream

CONCEPT_SEED, EFFECT_SEED, DETECTOR_SEED, REFINING_SEED = 20_000_000, 30_000_000, 70_000_000, 15_000_000

SMOKE = argparse.Namespace(
    images=8,
    refining_images=8,
    held_out=8,
    concept_images=144,
    effect_images=1,
    detector_prompts=304,
    batch=8,
    latents=(64, 64),
    k=8,
)


def new_sae(width: int, n_latents: int, site: str, args: argparse.Namespace) -> TopKSAE:
    origin = {
        "site": {"path": site, "kind": "output", "stream": "image", "layout": "positions"},
        "base_model": "emoji-sd",
        "branch": "cond",
        "scheduler": "DDIMScheduler",
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "resolution": 64,
        "training_images": args.images + args.refining_images,
    }
    return TopKSAE(width, n_latents, args.k, provenance=origin)


def refined(pipe: Any, saes: Mapping[str, SparseAutoencoder], args: argparse.Namespace) -> dict[str, SparseAutoencoder]:
    """The SAEs after a second pass, on other images, in which hard timesteps count more."""
    config = StreamingConfig(
        args.refining_images,
        args.batch,
        rows=1024,
        reuse=1.5,
        emphasis=6.0,
        first_steps=4,
        seed=REFINING_SEED,
    )
    captions = sample_captions(args.refining_images, seed=REFINING_SEED)
    makers = {site: lambda width, sae=sae: sae.train() for site, sae in saes.items()}
    training = {"lr": 4e-3, "warmup": 0.05, "decay": 0.95}
    folder = args.world / "training" / "sae_refined"
    return train_on_stream(pipe, makers, captions, config, folder, training=training, trained=True, **CALL)


def effects(pipe: Any, saes: Mapping[str, SparseAutoencoder], images: int) -> dict[str, torch.Tensor]:
    """`{site: (C, T, n)}`: effect of every latent towards every concept, over scenes that differ in it alone."""
    found: dict[str, list[torch.Tensor]] = {site: [] for site in saes}
    for concept, factor in tqdm(CONCEPTS.items(), desc="effects"):
        rng = random.Random(EFFECT_SEED)
        scenes = [scene_with(factor, CONCEPT_VALUES[concept], rng) for _ in range(images)]
        prompts = [s.caption() for s in scenes]
        neutral = [replace(s, **{factor: None}).caption() for s in scenes]
        measured, _ = concept_effect(pipe, saes, prompts, neutral, seed=EFFECT_SEED, **CALL)
        for site, each in found.items():
            each.append(measured[site])
    return {site: torch.stack(each) for site, each in found.items()}


def detectors_of(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], prompts: int, batch_size: int
) -> Mapping[Site, ConceptDetectors]:
    """Detectors from captions in which factors are left out at times."""
    rng = random.Random(DETECTOR_SEED)
    scenes = [leave_out(sample_scene(rng), rng) for _ in range(prompts)]
    labelled = [(scene.caption(i), scene.concepts()) for i, scene in enumerate(scenes)]
    return concept_detectors(pipe, saes, labelled, CONCEPTS, batch_size=batch_size, seed=DETECTOR_SEED, **CALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"))
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--refining-images", type=int, default=4096)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--concept-images", type=int, default=768)
    parser.add_argument("--effect-images", type=int, default=4)
    parser.add_argument("--detector-prompts", type=int, default=3072)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--latents", type=int, nargs=len(SITES), default=(2560, 1024), help="one number a site")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--reuse", type=float, default=2.0)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    if args.smoke:
        CALL["num_inference_steps"] = 2  # of everything that generates
    torch.manual_seed(0)
    pipe = load_pipeline(args.world / "emoji-sd")
    sizes = dict(zip(SITES, args.latents, strict=True))
    makers = {site: lambda width, site=site: new_sae(width, sizes[site], site, args) for site in SITES}
    config = StreamingConfig(args.images, args.batch, rows=512, reuse=args.reuse)
    captions = sample_captions(args.images, seed=0)
    saes = train_on_stream(pipe, makers, captions, config, args.world / "training" / "sae", **CALL)
    saes = refined(pipe, saes, args)
    figures, statistics = reconstruction(pipe, saes, args.held_out, args.batch)
    rng = random.Random(CONCEPT_SEED)
    scenes = [sample_scene(rng) for _ in range(args.concept_images)]
    labelled = [(scene.caption(i), scene.concepts()) for i, scene in enumerate(scenes)]
    scores = concept_activity(pipe, saes, labelled, CONCEPTS, batch_size=args.batch, seed=CONCEPT_SEED, **CALL)
    towards = effects(pipe, saes, args.effect_images)
    detectors = detectors_of(pipe, saes, args.detector_prompts, args.batch)
    for site, sae in saes.items():
        scores[site].effect = towards[site]
        save(sae, statistics[site].finish(), scores[site], detectors[site], figures[site], args.world / "saes" / site)


def save(
    sae: SparseAutoencoder,
    statistics: LatentStatistics,
    scores: ConceptScores,
    detectors: ConceptDetectors,
    figures: dict,
    folder: Path,
) -> None:
    """Everything about one SAE, with checksums."""
    sae.statistics = statistics
    sae.save_pretrained(folder, figures=figures)
    scores.save(folder)
    detectors.save(folder)
    write_checksums(folder)
    print(folder, {k: v for k, v in figures.items() if k != "fvu_by_timestep"})


if __name__ == "__main__":
    main()
