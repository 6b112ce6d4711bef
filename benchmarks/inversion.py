"""How near inverted images come back: `python benchmarks/inversion.py --world outputs/emoji_world`.

Fresh renders of the demo world are inverted on emoji-sd by their captions, without guidance, and generated again
without edits: by steps of a whole run, by share `to` of the noise schedule, and by iterations a step. The autoencoder
alone bounds what can come back, unless its decoder is inverted as well. Beside ours: diffusers'
`DDIMInverseScheduler`. Writes `benchmarks/results/inversion.json` and `inversion.png`; a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parse
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline

from diffusers_sae import Inversion, invert
from diffusers_sae.demo.judge import Judge
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import load_judge, load_pipeline, look
from diffusers_sae.demo.world import FACTORS, Scene, sample_scene

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/emoji_world"))

SEED = 987_654  # no training run of the demo world has it
STEPS = (10, 20, 50, 100)
SHARES = (0.5, 0.7, 1.0)
ITERATIONS = (1, 3)
DECODER = ((1, 3), (3, 10))
"""Iterations a step, and of the decoder's inversion, which goes beyond the autoencoder's bound."""
SHOWN = ((10, 1.0, 1), (20, 1.0, 1), (50, 1.0, 1), (20, 1.0, 3))


def renders(count: int, world: Path) -> tuple[list[Scene], torch.Tensor]:
    """Random full scenes and their images `(count, 3, 64, 64)` in [0, 1]."""
    from canvas import Canvas

    rng, canvas = random.Random(SEED), Canvas.fetched(world)
    scenes = [sample_scene(rng) for _ in range(count)]
    images = [np.array(canvas.render(scene, rng)) for scene in scenes]
    return scenes, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each pair of images `(N, 3, H, W)` in [0, 1], in dB."""
    return -10 * (images - others).square().mean((1, 2, 3)).log10()


def named_right(judge: Judge, scenes: list[Scene], images: torch.Tensor) -> float:
    """Share of all factors that can be seen in the scenes that the judge names right."""
    seen = look(judge, list(2 * images - 1))
    right = [
        verdict[factor][0] == FACTORS[factor][label]
        for scene, verdict in zip(scenes, seen, strict=True)
        for factor, label in scene.labels().items()
        if label >= 0
    ]
    return sum(right) / len(right)


@torch.no_grad()
def encoded(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    return pipe.vae.encode(2 * images - 1).latent_dist.mode() * pipe.vae.config.scaling_factor


@torch.no_grad()
def autoencoded(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    return (pipe.vae.decode(pipe.vae.encode(2 * images - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)


def by_diffusers(pipe: Any, images: torch.Tensor, prompts: list[str], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and images of diffusers' inverse scheduler in the stock pipeline."""
    config = pipe.scheduler.config
    stock = StableDiffusionPipeline(**{**pipe.components, "scheduler": DDIMInverseScheduler.from_config(config)})
    stock.set_progress_bar_config(disable=True)
    call = {"prompt": prompts, "guidance_scale": 1.0, "num_inference_steps": steps}
    noise = stock(latents=encoded(pipe, images), output_type="latent", **call).images
    stock.scheduler = DDIMScheduler.from_config(config)
    return noise, stock(latents=noise, output_type="pt", **call).images


def ours(
    pipe: Any, images: torch.Tensor, prompts: list[str], steps: int, to: float, iterations: int, decoder: int = 0
) -> tuple[Inversion, torch.Tensor]:
    inversion = invert(
        pipe, images, prompts, to, num_inference_steps=steps, iterations=iterations, decoder_iterations=decoder
    )
    return inversion, inversion.run(pipe, output_type="pt").images


def figures_of(found: torch.Tensor, noise: torch.Tensor, original: torch.Tensor, bound: torch.Tensor) -> dict[str, Any]:
    to_image = psnr(found, original)
    return {
        "psnr": to_image.mean().item(),
        "psnr_worst": to_image.min().item(),
        "below_autoencoder": (psnr(bound, original) - to_image).mean().item(),
        "psnr_to_autoencoder": psnr(found, bound).mean().item(),
        "latent_std": noise.std().item(),
    }


def draw(rows: list[tuple[str, torch.Tensor]], original: torch.Tensor, path: Path) -> None:
    """Eight images a row, each with its distance to the original."""
    drawn = []
    for headline, images in rows:
        decibels = psnr(images, original)
        captions = ["" if d.isinf() else f"{d:.1f} dB" for d in decibels[:8]]
        drawn.append(Row(headline, list(2 * images[:8] - 1), captions))
    draw_grid(drawn, "Renders inverted to pure noise on emoji-sd, and generated again", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"), help="folder with sprites.npz")
    parser.add_argument("--images", type=int, default=16)
    parser.set_defaults(steps=STEPS, shares=SHARES, shown=SHOWN, decoder=DECODER)
    args = parse(
        parser, "inversion.json", images=4, steps=(2,), shares=(0.7, 1.0), shown=((2, 1.0, 1),), decoder=((1, 1),)
    )
    pipe, judge = load_pipeline(), load_judge()
    scenes, images = renders(args.images, args.world)
    prompts = [scene.caption() for scene in scenes]
    bound = autoencoded(pipe, images)
    figures: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    figures |= {
        "images": args.images,
        "guidance_scale": 1.0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "autoencoder": {
            "psnr": psnr(bound, images).mean().item(),
            "psnr_worst": psnr(bound, images).min().item(),
            "named_right": named_right(judge, scenes, bound),
        },
        "original": {"named_right": named_right(judge, scenes, images)},
    }

    def record(name: str, noise: torch.Tensor, found: torch.Tensor, seconds: float, **what: Any) -> None:
        measured = figures_of(found, noise, images, bound)
        right = named_right(judge, scenes, found)
        figures["runs"][name] = {**what, **measured, "named_right": right, "seconds": seconds}
        print(json.dumps({name: figures["runs"][name]}), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")

    rows = [("original", images), ("the autoencoder alone", bound)]
    for iterations in ITERATIONS:
        for steps in args.steps:
            for to in args.shares:
                name, shown = f"{steps} steps, to {to}, {iterations} iterations", (steps, to, iterations) in args.shown
                if name in figures["runs"] and not shown:
                    continue
                start = time.perf_counter()
                inversion, found = ours(pipe, images, prompts, steps, to, iterations)
                seconds = time.perf_counter() - start
                what = {"steps": steps, "to": to, "iterations": iterations, "begins_at": inversion.timesteps[0]}
                record(name, inversion.latents, found, seconds, **what)
                if shown:
                    rows.append((f"{steps} steps, {iterations} iteration{'s' * (iterations > 1)} a step", found))
    for iterations, decoder in args.decoder:
        for steps in args.steps[:3]:
            name, shown = (
                f"{steps} steps, to 1.0, {iterations} iterations, decoder {decoder}",
                steps == args.steps[:3][-1],
            )
            if name in figures["runs"] and not shown:
                continue
            start = time.perf_counter()
            inversion, found = ours(pipe, images, prompts, steps, 1.0, iterations, decoder)
            seconds = time.perf_counter() - start
            what = {"steps": steps, "to": 1.0, "iterations": iterations, "decoder_iterations": decoder}
            record(name, inversion.latents, found, seconds, **what)
            if shown:
                rows.append((f"{steps} steps, {iterations} a step, {decoder} of the decoder's inversion", found))
    for steps in args.steps[:3]:
        name = f"{steps} steps, DDIMInverseScheduler"
        if name not in figures["runs"]:
            start = time.perf_counter()
            noise, found = by_diffusers(pipe, images, prompts, steps)
            record(name, noise, found, time.perf_counter() - start, steps=steps, to=1.0)
    draw(rows, images, args.out.with_suffix(".png"))
    print(os.path.getsize(args.out.with_suffix(".png")), "bytes of picture")


if __name__ == "__main__":
    main()
