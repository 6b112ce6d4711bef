"""Train emoji-kandinsky: `python train_kandinsky.py`. Writes `emoji-kandinsky`: what its decoder and its prior learned,
and an SAE of the embeddings between them.

Needs `emoji-sd`, and `train_clip.py --freeze-text`. The decoder is emoji-sd's U-Net, in which what reads the text is
trained to read image embeddings instead: first to give what the U-Net was given for the caption, then by the loss that
the U-Net was trained with. The prior predicts embeddings from captions (Ramesh et al., 2022, section 2.2).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from canvas import Canvas
from diffusers import PriorTransformer, StableDiffusionPipeline, UnCLIPScheduler, UNet2DConditionModel
from loop import Losses, arguments, fit, mosaic, to_tensor
from safetensors.torch import save_file
from tqdm import tqdm
from train_unet import cache_latents
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_sae import MatryoshkaSAE
from diffusers_sae.checksums import sha256
from diffusers_sae.demo.kandinsky import decoder_pipeline, movq_of, new_decoder, new_prior, reads_the_embedding
from diffusers_sae.demo.world import Scene, sample_caption, sample_scene
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter
from diffusers_sae.saes import SparseAutoencoder, StatisticsAccumulator
from diffusers_sae.training import TrainingConfig
from diffusers_sae.training.from_rows import train_on_rows

CACHED = 98304
"""Latents that the training of emoji-sd left."""
HELD_OUT = 2048
"""Scenes, the last ones, that the SAE is measured on."""


@dataclass
class Data:
    """Scenes, their latents `(N, 4, 16, 16)` and embeddings `(N, d)`, and the models that made these."""

    args: argparse.Namespace
    sd: StableDiffusionPipeline
    encoder: CLIPVisionModelWithProjection
    text: CLIPTextModelWithProjection
    canvas: Canvas
    scenes: list[Scene]
    latents: np.ndarray
    embeds: torch.Tensor
    name: str
    """Prefix of the checkpoints, which no other image encoder goes on with."""

    def tokens(self, captions: list[str]):
        found = self.sd.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return found.to(self.args.device)

    def like(self, **changes: int | float) -> argparse.Namespace:
        """The arguments of the script with others in their place."""
        return argparse.Namespace(**{**vars(self.args), **changes})


def data_of(args: argparse.Namespace) -> Data:
    def load(cls, *path: str):
        return cls.from_pretrained(args.world.joinpath(*path)).to(args.device)

    sd = StableDiffusionPipeline.from_pretrained(args.world / "emoji-sd", safety_checker=None).to(args.device)
    encoder = load(CLIPVisionModelWithProjection, "emoji-kandinsky", "image_encoder").eval()
    text = load(CLIPTextModelWithProjection, "emoji-clip", "text_encoder").eval()
    name = "kandinsky-" + sha256(args.world / "emoji-kandinsky" / "image_encoder" / "model.safetensors")[:8]
    canvas, folder = Canvas(args.world / "sprites.npz"), args.world / "training"
    latents, scenes = cache_latents(folder / "latents.npy", canvas, sd.vae, CACHED, args.device)
    scenes = scenes[: args.scenes]
    embeds = cache_embeds(folder / f"{name}-embeds.npy", canvas, encoder, scenes, args.device)
    return Data(args, sd, encoder, text, canvas, scenes, latents, embeds, name)


@torch.no_grad()
def cache_embeds(
    path: Path, canvas: Canvas, encoder: CLIPVisionModelWithProjection, scenes: list[Scene], device: str
) -> torch.Tensor:
    """(count, d), also on disk, of the renders that the cached latents were made of."""
    if not path.exists():
        found = []
        for start in tqdm(range(0, len(scenes), 64), desc="embeds"):
            images = [canvas.render(s, random.Random(start + i)) for i, s in enumerate(scenes[start : start + 64])]
            found.append(encoder(to_tensor(images, device)).image_embeds.cpu().numpy())
        partial = path.with_suffix(".part.npy")
        np.save(partial, np.concatenate(found))
        partial.rename(path)
    return torch.from_numpy(np.load(path)).to(device)


def trained_decoder(data: Data) -> UNet2DConditionModel:
    args, sd, device = data.args, data.sd, data.args.device
    with torch.no_grad():
        nothing = data.encoder(torch.zeros(1, 3, 64, 64, device=device)).image_embeds
    spread = data.embeds.std(0)

    def some(rng: random.Random, count: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Indices, embeddings with a little noise, and which of them are left out."""
        picks = sorted(rng.randrange(len(data.scenes)) for _ in range(count))
        x = data.embeds[picks]
        left_out = torch.rand(count, 1, device=device) < 0.1
        return picks, torch.where(left_out, nothing, x + 0.1 * spread * torch.randn_like(x)), left_out[:, 0]

    decoder = new_decoder(sd.unet, data.encoder.config.projection_dim).to(device, memory_format=torch.channels_last)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(reads_the_embedding(name))
    projection = decoder.encoder_hid_proj

    def start_losses(step: int, rng: random.Random) -> Losses:
        picks, x, left_out = some(rng, 256)
        captions = ["" if gone else data.scenes[i].caption() for i, gone in zip(picks, left_out.tolist(), strict=True)]
        with torch.no_grad():
            states = sd.text_encoder(data.tokens(captions).input_ids).last_hidden_state
            more = projection.num_image_text_embeds - states.shape[1]
            states = torch.cat([states, states[:, -1:].expand(-1, more, -1)], 1)
        return {"loss": F.mse_loss(projection(x), states)}

    fit(projection, start_losses, data.like(steps=args.start_steps, lr=5e-3), name=f"{data.name}-start", every=100)
    alpha_bar = sd.scheduler.alphas_cumprod.to(device)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=5) / (snr + 1)

    def losses(step: int, rng: random.Random) -> Losses:
        picks, condition, _ = some(rng, args.batch)
        x = torch.from_numpy(data.latents[picks].astype(np.float32)).to(device)
        t = torch.randint(0, len(alpha_bar), (len(x),)).to(device)
        noise = torch.randn(x.shape).to(device)
        noisy = sd.scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        found = decoder(noisy, t, None, added_cond_kwargs={"image_embeds": condition}).sample[:, : x.shape[1]]
        error = (found.float() - sd.scheduler.get_velocity(x, noise, t)).square().mean((1, 2, 3))
        return {"loss": (weight[t] * error).mean(), "mse": error.detach().mean()}

    pipe, rng = decoder_pipeline(decoder, sd.scheduler, movq_of(sd.vae)), random.Random(-7)
    originals = [data.canvas.render(sample_scene(rng), rng) for _ in range(32)]

    @torch.no_grad()
    def sheet():
        given = data.encoder(to_tensor(originals, device)).image_embeds
        images = pipe(
            given, nothing.expand_as(given), height=64, width=64, num_inference_steps=20, guidance_scale=2.0,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        return mosaic([x for pair in zip(originals, images, strict=True) for x in pair], 16)

    fit(decoder, losses, args, name=data.name, sheet=sheet, every=50, ema_decay=0.998)
    return decoder


def trained_prior(data: Data, scheduler: UnCLIPScheduler) -> PriorTransformer:
    """By the squared error of the embedding that it predicts from a noisy one."""
    args, device = data.args, data.args.device
    prior = new_prior(data.text, data.embeds).to(device)
    alpha_bar = scheduler.alphas_cumprod.to(device)

    def losses(step: int, rng: random.Random) -> Losses:
        picks = [rng.randrange(len(data.scenes)) for _ in range(128)]
        captions = ["" if rng.random() < 0.1 else sample_caption(data.scenes[i], rng) for i in picks]
        tokens = data.tokens(captions)
        with torch.no_grad():
            read = data.text(tokens.input_ids)
        x = (data.embeds[picks] - prior.clip_mean) / prior.clip_std
        t = torch.randint(0, len(alpha_bar), (len(x),)).to(device)
        a = alpha_bar[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * torch.randn(x.shape).to(device)
        mask = tokens.attention_mask.bool()
        found = prior(noisy, t, read.text_embeds, read.last_hidden_state, mask).predicted_image_embedding
        return {"loss": F.mse_loss(found.float(), x)}

    fit(prior, losses, data.like(steps=args.prior_steps, lr=2e-3), name=f"{data.name}-prior", every=100)
    return prior


def trained_sae(data: Data) -> tuple[SparseAutoencoder, dict[str, float]]:
    """A Matryoshka SAE of the embeddings with its statistics, and its figures on embeddings held out."""
    seen, held = data.embeds[:-HELD_OUT].cpu(), data.embeds[-HELD_OUT:].cpu()
    provenance = {"site": {"path": "image_embeds"}, "base_model": "emoji-kandinsky"}
    torch.manual_seed(0)
    sae = MatryoshkaSAE(seen.shape[1], data.args.latents, data.args.k, provenance=provenance)
    train_on_rows(seen, sae, TrainingConfig(data.args.sae_steps, 1024, lr=2e-3, decay=0.5, dead_after=50_000))
    statistics, meter = StatisticsAccumulator(sae.n_latents), ReconstructionMeter(sae)
    with torch.no_grad():
        for rows in seen.split(2048):
            statistics.add(0.0, sae.encode_sparse(rows))
    meter.add(0.0, held)
    sae.statistics = statistics.finish()
    figures = meter.figures()
    dead = float(sae.statistics.dead.float().mean())
    return sae, {**{name: round(figures[name], 5) for name in ("fvu", "cosine", "l0")}, "dead": dead}


def main() -> None:
    parser = arguments(__doc__, steps=450, batch=48, lr=1e-3)
    parser.add_argument("--scenes", type=int, default=24576)
    parser.add_argument("--start-steps", type=int, default=400)
    parser.add_argument("--prior-steps", type=int, default=1200)
    parser.add_argument("--sae-steps", type=int, default=3000)
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--k", type=int, default=8)
    args = parser.parse_args()
    data, out = data_of(args), args.world / "emoji-kandinsky"
    sae, figures = trained_sae(data)
    print("SAE", figures, flush=True)
    decoder = trained_decoder(data)
    scheduler = UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0)
    prior = trained_prior(data, scheduler)
    out.mkdir(exist_ok=True)
    learned = {name: x.contiguous() for name, x in decoder.state_dict().items() if reads_the_embedding(name)}
    save_file(learned, out / "decoder.safetensors")
    prior.save_pretrained(out / "prior")
    scheduler.save_pretrained(out / "prior_scheduler")
    sae.save_pretrained(out / "sae")
    (out / "sae" / "held_out.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
