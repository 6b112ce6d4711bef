"""Kernels that a steered step launches, and how often the host waits: part (e) of `steering_overhead.py`.

A whole pipeline runs on `counting_device`, without an SAE and steered, over n and over 2n steps; the difference is what
a step costs, and the rest what a run costs once. A kernel is an operation that launches at least one.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from counting_device import DEVICE, Counts, counted
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_sae import Rule, SAESteeringPipeline, StrengthTable, TopKSAE

SITE, WIDTH, LATENTS, K = "unet.up_blocks.1.attentions.0", 8, 20_480, 32
TEN = dict.fromkeys(range(10), 1.5)
MASK = torch.linspace(0, 1, 64).reshape(8, 8)

PLANS: dict[str, dict[str, Any]] = {
    "add, one feature": {"features": {3: 1.5}},
    "add": {},
    "set": {"mode": "set"},
    "scale, one feature": {"features": {3: 1.5}, "mode": "scale"},
    "scale": {"mode": "scale"},
    "cap": {"mode": "cap"},
    "ablate": {"mode": "ablate"},
    "replace": {"mode": "replace"},
    "add, both branches": {"branch": "both"},
    "scale, both branches": {"mode": "scale", "branch": "both"},
    "scale, contrast": {"mode": "scale", "branch": "contrast"},
    "add, window of half the steps": {"stop": 0.5},
    "scale, window of half the steps": {"mode": "scale", "stop": 0.5},
    "add, mask": {"mask": MASK},
    "scale, mask": {"mode": "scale", "mask": MASK},
    "add, function of progress": {"features": {3: lambda p: 1 + p}},
    "add, table over timesteps": {"features": {3: StrengthTable((900.0, 100.0), (1.0, 2.0))}},
    "add, two images, a strength for each": {"features": {3: [1.0, 2.0]}, "images": 2},
    "scale, two images, a strength for each": {"features": {3: [1.0, 2.0]}, "mode": "scale", "images": 2},
    "add, preserve_norm": {"preserve_norm": True},
    "add, rule about the image": {"when": Rule({5: 1.0}, above=-1.0)},
    "scale, rule about the image": {"mode": "scale", "when": Rule({5: 1.0}, above=-1.0)},
    "add, timesteps as Flux gives them": {"own_timesteps": True},
    "scale, timesteps as Flux gives them": {"mode": "scale", "own_timesteps": True},
}
"""Arguments of `steer` by name; ten features on the cond branch, all steps and one image, unless they say otherwise."""


def steerable(unet: UNet2DConditionModel) -> Any:
    """A steerable Stable Diffusion pipeline of a U-Net alone: from prompt embeddings to latents."""
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return SAESteeringPipeline.from_pipe(pipe)


def pipeline(own_timesteps: bool) -> Any:
    """A small U-Net in fp16; the timesteps that it is given may be tensors of their own, and not the scheduler's."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        block_out_channels=(WIDTH, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    unet = unet.half().eval().requires_grad_(False)
    if own_timesteps:
        unet.register_forward_pre_hook(lambda module, args: (args[0], args[1].clone(), *args[2:]))
    return steerable(unet)


@torch.no_grad()
def count_run(pipe: Any, steps: int, images: int = 1) -> Counts:
    """What one call of the pipeline launches, guidance on."""
    with counted() as counts:
        pipe.unet.to(DEVICE)
        embeds = torch.randn(images, 7, 16, dtype=torch.float16, device=DEVICE)
        latents = torch.randn(images, 4, 8, 8, dtype=torch.float16, device=DEVICE)
        counts.clear()
        pipe(
            prompt_embeds=embeds, negative_prompt_embeds=embeds, latents=latents, num_inference_steps=steps,
            guidance_scale=7.5, height=64, width=64, output_type="latent",
        )  # fmt: skip
    return counts


@functools.cache
def bare_run(own_timesteps: bool, steps: int, images: int) -> Counts:
    return count_run(pipeline(own_timesteps), steps, images)


def cost_of(plan: dict[str, Any], steps: int) -> dict[str, Any]:
    """What a plan adds to a step, and once to a run."""
    arguments = {"features": TEN, **plan}
    images, own = arguments.pop("images", 1), arguments.pop("own_timesteps", False)
    pipe = pipeline(own)
    runs = (steps, 2 * steps)
    bare = [bare_run(own, n, images) for n in runs]
    with counted():
        sae = TopKSAE(WIDTH, LATENTS, K).to(DEVICE)
    pipe.load_sae(sae, site=SITE)
    pipe.steer(**arguments)
    steered = [count_run(pipe, n, images) for n in runs]
    launches = [_difference(s.launches, b.launches) for s, b in zip(steered, bare, strict=True)]
    waits = [_difference(s.waits, b.waits) for s, b in zip(steered, bare, strict=True)]
    by_name = _difference(launches[1], launches[0])
    per_step = by_name.total() / steps
    waits_per_step = _difference(waits[1], waits[0]).total() / steps
    return {
        "kernels_per_step": per_step,
        "waits_per_step": waits_per_step,
        "kernels_once": launches[0].total() - per_step * steps,
        "waits_once": waits[0].total() - waits_per_step * steps,
        "operations_per_step": {name: count / steps for name, count in sorted(by_name.items()) if count},
    }


def _difference(a: Counter[str], b: Counter[str]) -> Counter[str]:
    found = Counter(a)
    found.subtract(b)
    return found


def kernels(steps: int, smoke: bool) -> dict[str, Any]:
    """(e): what each plan adds to a bare step, whose own count is given too."""
    bare = [bare_run(False, n, 1) for n in (steps, 2 * steps)]
    names = ["add", "scale"] if smoke else list(PLANS)
    return {
        "steps": steps,
        "latents": LATENTS,
        "bare_kernels_per_step": (bare[1].launches.total() - bare[0].launches.total()) / steps,
        "bare_waits_per_step": (bare[1].waits.total() - bare[0].waits.total()) / steps,
        "plans": {name: cost_of(PLANS[name], steps) for name in names},
    }
