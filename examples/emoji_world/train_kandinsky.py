"""Train emoji-kandinsky: `python train_kandinsky.py`. Writes `emoji-kandinsky`: what its decoder and its prior learned.

Needs `emoji-sd` and `emoji-clip`. The decoder is emoji-sd's U-Net, in which what reads the text is trained to read
image embeddings of emoji-clip instead: first to give what the U-Net was given for the caption, then by the loss that
the U-Net was trained with. The prior predicts embeddings from captions (Ramesh et al., 2022, section 2.2).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from canvas import Canvas
from diffusers import PriorTransformer, StableDiffusionPipeline, UnCLIPScheduler
from loop import Losses, arguments, fit, mosaic, to_tensor
from safetensors.torch import save_file
from tqdm import tqdm
from train_unet import cache_latents
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from diffusers_sae.demo.kandinsky import movq_of, new_decoder, new_prior, pipeline, reads_the_embedding
from diffusers_sae.demo.world import Scene, sample_caption, sample_scene


@torch.no_grad()
def cache_embeds(path: Path, canvas: Canvas, encoder: CLIPVisionModelWithProjection, scenes: list, device: str):
    """(count, d) on disk, of the renders that the cached latents were made of."""
    if not path.exists():
        found = []
        for start in tqdm(range(0, len(scenes), 64), desc="embeds"):
            images = [canvas.render(s, random.Random(start + i)) for i, s in enumerate(scenes[start : start + 64])]
            found.append(encoder(to_tensor(images, device)).image_embeds.cpu().numpy())
        partial = path.with_suffix(".part.npy")
        np.save(partial, np.concatenate(found))
        partial.rename(path)
    return torch.from_numpy(np.load(path)).to(device)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: str) -> dict[str, torch.Tensor]:
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return ids.to(device)


def with_steps(args: argparse.Namespace, steps: int, batch: int, lr: float) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "steps": steps, "batch": batch, "lr": lr})


def main() -> None:
    parser = arguments(__doc__, steps=450, batch=48, lr=1e-3)
    parser.add_argument("--scenes", type=int, default=24576)
    parser.add_argument("--start-steps", type=int, default=600)
    parser.add_argument("--prior-steps", type=int, default=1200)
    args = parser.parse_args()
    device, out = args.device, args.world / "emoji-kandinsky"
    sd = StableDiffusionPipeline.from_pretrained(args.world / "emoji-sd", safety_checker=None).to(device)
    encoder = CLIPVisionModelWithProjection.from_pretrained(args.world / "emoji-clip" / "image_encoder").to(device)
    text = CLIPTextModelWithProjection.from_pretrained(args.world / "emoji-clip" / "text_encoder").to(device)
    canvas = Canvas(args.world / "sprites.npz")
    folder = args.world / "training"
    latents, scenes = cache_latents(folder / "latents.npy", canvas, sd.vae, 98304, device)
    scenes = scenes[: args.scenes]
    embeds = cache_embeds(folder / "embeds.npy", canvas, encoder, scenes, device)
    nothing = encoder(torch.zeros(1, 3, 64, 64, device=device)).image_embeds.detach()
    spread = embeds.std(0)

    def some(rng: random.Random, count: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Indices, embeddings with a little noise, and which of them are left out."""
        picks = sorted(rng.randrange(len(scenes)) for _ in range(count))
        x = embeds[picks]
        left_out = torch.rand(count, 1, device=device) < 0.1
        return picks, torch.where(left_out, nothing, x + 0.1 * spread * torch.randn_like(x)), left_out[:, 0]

    decoder = new_decoder(sd.unet, encoder.config.projection_dim).to(device)
    decoder.to(memory_format=torch.channels_last)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(reads_the_embedding(name))
    projection = decoder.encoder_hid_proj

    def start_losses(step: int, rng: random.Random) -> Losses:
        picks, x, left_out = some(rng, 256)
        captions = ["" if gone else scenes[i].caption() for i, gone in zip(picks, left_out.tolist(), strict=True)]
        with torch.no_grad():
            states = sd.text_encoder(tokenize(sd.tokenizer, captions, device)["input_ids"]).last_hidden_state
            more = projection.num_image_text_embeds - states.shape[1]
            states = torch.cat([states, states[:, -1:].expand(-1, more, -1)], 1)
        return {"loss": F.mse_loss(projection(x), states)}

    fit(projection, start_losses, with_steps(args, args.start_steps, 256, 5e-3), name="kandinsky_start", every=200)

    alpha_bar = sd.scheduler.alphas_cumprod.to(device)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / (snr + 1)

    def losses(step: int, rng: random.Random) -> Losses:
        picks, condition, _ = some(rng, args.batch)
        x = torch.from_numpy(latents[picks].astype(np.float32)).to(device)
        t = torch.randint(0, len(alpha_bar), (len(x),)).to(device)
        noise = torch.randn(x.shape).to(device)
        noisy = sd.scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        found = decoder(noisy, t, None, added_cond_kwargs={"image_embeds": condition}).sample[:, :4]
        error = (found.float() - sd.scheduler.get_velocity(x, noise, t)).square().mean((1, 2, 3))
        return {"loss": (weight[t] * error).mean(), "mse": error.detach().mean()}

    movq = movq_of(sd.vae)
    held_out = random.Random(-7)
    shown: list[Scene] = [sample_scene(held_out) for _ in range(32)]
    originals = [canvas.render(s, held_out) for s in shown]

    @torch.no_grad()
    def sheet():
        pipe = pipeline(decoder, sd.scheduler, movq)
        given = encoder(to_tensor(originals, device)).image_embeds
        images = pipe(given, nothing.expand_as(given), height=64, width=64, num_inference_steps=20, guidance_scale=2.0,
                      generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        return mosaic([x for pair in zip(originals, images, strict=True) for x in pair], 16)

    fit(decoder, losses, args, name="kandinsky", sheet=sheet, every=100, ema_decay=0.998)

    prior = new_prior(text, embeds).to(device)
    scheduler = UnCLIPScheduler(**{"prediction_type": "sample", "variance_type": "fixed_small_log"})
    prior_losses = losses_of_prior(prior, scheduler, text, sd.tokenizer, embeds, scenes, 128, device)
    fit(prior, prior_losses, with_steps(args, args.prior_steps, 128, 2e-3), name="prior", every=250)

    out.mkdir(exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in decoder.state_dict().items() if reads_the_embedding(k)},
        out / "decoder.safetensors",
    )
    prior.save_pretrained(out / "prior")
    scheduler.save_pretrained(out / "prior_scheduler")


def losses_of_prior(
    prior: PriorTransformer,
    scheduler: UnCLIPScheduler,
    text: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    embeds: torch.Tensor,
    scenes: list[Scene],
    batch: int,
    device: str,
) -> Callable[[int, random.Random], Losses]:
    """The squared error of the embedding that the prior predicts from a noisy one."""
    alpha_bar = scheduler.alphas_cumprod.to(device)

    def losses(step: int, rng: random.Random) -> Losses:
        picks = [rng.randrange(len(scenes)) for _ in range(batch)]
        captions = ["" if rng.random() < 0.1 else sample_caption(scenes[i], rng) for i in picks]
        tokens = tokenize(tokenizer, captions, device)
        with torch.no_grad():
            read = text(tokens["input_ids"])
        x = (embeds[picks] - prior.clip_mean) / prior.clip_std
        t = torch.randint(0, len(alpha_bar), (batch,)).to(device)
        a = alpha_bar[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * torch.randn(x.shape).to(device)
        mask = tokens["attention_mask"].bool()
        found = prior(noisy, t, read.text_embeds, read.last_hidden_state, mask).predicted_image_embedding
        return {"loss": F.mse_loss(found.float(), x)}

    return losses


if __name__ == "__main__":
    main()
