"""h at 0.7 T: of images with noise, for which the U-Net runs no further than h, or of generations."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from kinds import AT, PATH, STEPS
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from diffusers_sae import SAESteeringPipeline
from diffusers_sae.capture import stream_activations
from diffusers_sae.demo.world import Scene, sample_scene

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji_world"))
SEED = 31_000


@dataclass
class Data:
    """h of training images `seen (noises * images, C, H, W)`, all images once and then again with other noise, and of
    images held out, `held (N, C, H, W)`; prompts, and for the demo model what they show, of all images."""

    seen: torch.Tensor
    held: torch.Tensor
    prompts: Sequence[str]
    scenes: Sequence[Scene]

    @property
    def images(self) -> int:
        """How many images are trained on."""
        return len(self.prompts) - len(self.held)

    @property
    def once(self) -> torch.Tensor:
        """h of each training image with its first noise."""
        return self.seen[: self.images]


def data_of(pipe: Any, args: argparse.Namespace) -> Data:
    """From the file of an earlier run, if it is there."""
    file, count = args.out / "h.safetensors", args.images + args.held_out
    scenes: list[Scene] = []
    if args.prompts is None:
        rng = random.Random(SEED)
        scenes = [sample_scene(rng) for _ in range(count)]
        prompts = [scene.caption(rng.randrange(3)) for scene in scenes]
    else:
        lines = [line for line in args.prompts.read_text().splitlines() if line.strip()]
        prompts = [lines[i % len(lines)] for i in range(count)]
    if not file.exists():
        noised = of_scenes(pipe, scenes, prompts, args) if scenes else of_generations(pipe, prompts, args.batch)
        args.out.mkdir(parents=True, exist_ok=True)
        save_file({"seen": noised[: -args.held_out].clone(), "held": noised[-args.held_out :].clone()}, file)
    h = load_file(file)
    if (len(h["seen"]) % args.images, len(h["held"])) != (0, args.held_out):
        raise SystemExit(f"{args.out} holds h of other images; choose another --out.")
    return Data(h["seen"], h["held"], prompts, scenes)


@torch.no_grad()
def of_scenes(pipe: Any, scenes: Sequence[Scene], prompts: Sequence[str], args: argparse.Namespace) -> torch.Tensor:
    """h `(noises * images + held out, C, H, W)` of renders with noise."""
    from canvas import Canvas

    canvas, latents = Canvas.fetched(args.world), []
    for start in tqdm(range(0, len(scenes), args.batch), desc="renders"):
        part = [canvas.render(s, random.Random(start + i)) for i, s in enumerate(scenes[start : start + args.batch])]
        pixels = pipe.image_processor.preprocess(part).to(pipe.device, pipe.vae.dtype)
        latents += list(pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor)
    noising = SAESteeringPipeline.from_pipe(AutoPipelineForImage2Image.from_pipe(pipe))
    noising.set_progress_bar_config(disable=True)
    found = []
    for noise in range(args.noises):
        some = args.images if noise + 1 < args.noises else len(prompts)  # those held out once, and last
        stream = stream_activations(
            noising, [PATH], prompts[:some], images=latents, strengths=[AT], batch_size=args.batch,
            seed=SEED + noise * len(prompts), num_inference_steps=STEPS, guidance_scale=1.0,
        )  # fmt: skip
        for batch in tqdm(stream, total=-(-some // args.batch), desc=f"noise {noise}"):
            found.append(_of_last_step(batch.sites[PATH]))
    return torch.cat(found)


@torch.no_grad()
def of_generations(pipe: Any, prompts: Sequence[str], batch: int) -> torch.Tensor:
    """h `(N, C, H, W)` of the last step at or above 0.7 T of generations without guidance; the rest is left out."""
    total = pipe.scheduler.config.num_train_timesteps
    found = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        following = pipe.scheduler.timesteps[min(step + 1, STEPS - 1)]
        pipe._interrupt = bool(following < AT * total - total / STEPS / 2)
        return tensors

    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        generators = [torch.Generator().manual_seed(SEED + first + i) for i in range(len(some))]
        with pipe.capture([PATH]) as activations:
            pipe(
                some, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent", generator=generators,
                callback_on_step_end=stop,
            )  # fmt: skip
        found.append(_of_last_step(activations[PATH]))
    return torch.cat(found)


def _of_last_step(seen: Any) -> torch.Tensor:
    return seen.select("cond", seen.timestep.min().item()).float().cpu()
