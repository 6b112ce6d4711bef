"""Train the U-Net of emoji-sd on cached latents: `python train_unet.py`. Writes the `emoji-sd` pipeline folder.

Needs `emoji-sd/vae` and `emoji-sd/text_encoder`. v-prediction (Salimans and Ho, 2022) with min-SNR weights
(Hang et al., 2023, gamma = 5) on a cosine schedule, text left out of every tenth sample for guidance.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from canvas import Canvas
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from loop import Losses, arguments, fit, mosaic, parse, to_tensor
from tqdm import tqdm
from train_clip import tokenize
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_sae.demo.world import Scene, sample_caption, sample_scene


def new_unet() -> UNet2DConditionModel:
    """Text enters at 8 x 8 and 4 x 4 only, as in SDXL the finest level has no attention."""
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


@torch.no_grad()
def cache_latents(path: Path, canvas: Canvas, vae: AutoencoderKL, count: int, device: str) -> tuple[np.ndarray, list]:
    """(count, 4, 16, 16) fp16 on disk and the scenes they show; scene `i` is drawn from generator `i`."""
    scenes = [sample_scene(random.Random(1_000_003 * (i + 1))) for i in range(count)]
    if not path.exists():
        partial = path.with_suffix(".part.npy")
        latents = np.lib.format.open_memmap(partial, "w+", np.float16, (count, 4, 16, 16))
        for start in tqdm(range(0, count, 64), desc="latents"):
            images = [canvas.render(s, random.Random(start + i)) for i, s in enumerate(scenes[start : start + 64])]
            x = to_tensor(images, device)
            latents[start : start + 64] = vae.encode(x).latent_dist.mean.cpu().numpy().astype(np.float16)
        latents.flush()
        partial.rename(path)
    return np.load(path, mmap_mode="r"), scenes


def main() -> None:
    parser = arguments(__doc__, steps=2800, batch=64, lr=5e-4)
    parser.add_argument("--scenes", type=int, default=98304)
    parser.set_defaults(shown=40)
    args = parse(parser, scenes=64, shown=4)
    folder = args.world / "emoji-sd"
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(args.device).eval()
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").to(args.device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = new_scheduler()
    unet = new_unet().to(args.device, memory_format=torch.channels_last)
    canvas = Canvas(args.world / "sprites.npz")
    latents, scenes = cache_latents(args.world / "training" / "latents.npy", canvas, vae, args.scenes, args.device)
    alpha_bar = scheduler.alphas_cumprod.to(args.device)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / (snr + 1)

    def losses(step: int, rng: random.Random) -> Losses:
        picks = [rng.randrange(args.scenes) for _ in range(args.batch)]
        x = torch.from_numpy(latents[sorted(picks)].astype(np.float32)).to(args.device)
        captions = ["" if rng.random() < 0.1 else sample_caption(scenes[i], rng) for i in sorted(picks)]
        with torch.no_grad():
            states = text_encoder(tokenize(tokenizer, captions, args.device)).last_hidden_state
        t = torch.randint(0, len(alpha_bar), (len(x),)).to(args.device)
        noise = torch.randn(x.shape).to(args.device)
        target = scheduler.get_velocity(x, noise, t)
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        error = (unet(noisy, t, states).sample.float() - target).square().mean((1, 2, 3))
        return {"loss": (weight[t] * error).mean(), "mse": error.detach().mean()}

    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    rng = random.Random(7)
    shown: list[Scene] = [sample_scene(rng) for _ in range(args.shown)]

    def sheet():
        generator = torch.Generator().manual_seed(0)
        prompts = [s.caption() for s in shown]
        return mosaic(pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generator).images, 8)

    fit(unet, losses, args, name="unet", sheet=sheet, every=500, ema_decay=0.9995)
    pipe.save_pretrained(folder)


if __name__ == "__main__":
    main()
