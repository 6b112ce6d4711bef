"""Train emoji-kandinsky: `python train_kandinsky.py`. Writes `emoji-kandinsky`: an image tower, a prior, an SAE of the
embeddings between them, and what the decoder has that emoji-sd's U-Net has not.

An embedding is a linear code of what the U-Net reads of the image's full caption: principal components of the text
encoder's states, of which the part is taken that is a sum of one vector a value (`cat`, `neon`, ...), so
that concepts are directions. The decoder turns it back by the one linear map that Kandinsky's decoders
have, so that its U-Net needs no training. The image tower learns to see the code in a picture, the prior to predict it
from captions (Ramesh et al., 2022, section 2.2).
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from canvas import Canvas
from diffusers import PriorTransformer, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UnCLIPScheduler
from loop import Losses, arguments, fit, parse
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_sae import TopKSAE
from diffusers_sae.demo.kandinsky import new_decoder, new_prior, reads_the_embedding
from diffusers_sae.demo.world import CONCEPT_VALUES, CONCEPTS, Scene, leave_out, sample_caption, sample_scene
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter
from diffusers_sae.saes import SparseAutoencoder, StatisticsAccumulator
from diffusers_sae.training import TrainingConfig
from diffusers_sae.training.from_rows import train_on_rows

HELD_OUT = 2048
"""Scenes, the last ones, whose renders nothing is trained on: figures are of these."""


@dataclass
class CaptionCode:
    """`code (N, d)` of captions' states `(N, T, D)` and back, `states = code @ basis + mean`, before the text encoder's
    last affine map."""

    sd: StableDiffusionPipeline
    mean: torch.Tensor
    basis: torch.Tensor

    @classmethod
    def of(cls, sd: StableDiffusionPipeline, width: int, file: Path) -> CaptionCode:
        """From a file, which is written unless it is there: learned with another number of threads, components have
        other signs, and models of a run that was stopped would not fit."""
        if not file.exists():
            code = cls.learned(sd, width)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"mean": code.mean, "basis": code.basis}, file)
        return cls(sd, **load_file(file, device=str(sd.device)))

    @classmethod
    def learned(cls, sd: StableDiffusionPipeline, width: int, captions: int = 8192) -> CaptionCode:
        """From full captions, some with factors left out, and the empty one, which guidance needs."""
        rng = random.Random(-11)
        scenes = [sample_scene(rng) for _ in range(captions)]
        texts = [(leave_out(s, rng) if i % 4 == 0 else s).caption() for i, s in enumerate(scenes)]
        code = cls(sd, torch.zeros(()), torch.zeros(()))
        states = code.states(texts + [""] * 64)
        torch.manual_seed(0)
        _, spread, basis = torch.pca_lowrank(states, q=width + 64, niter=6)
        scale = (spread[:width].square().sum() / len(states) / width).sqrt()  # codes have mean square 1
        return cls(sd, states.mean(0), scale * basis[:, :width].T.contiguous())

    @torch.no_grad()
    def states(self, captions: list[str]) -> torch.Tensor:
        """`(N, T D)` in front of the last affine map."""
        norm, found = self.norm, []
        different = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        texts = list(different)
        for start in range(0, len(texts), 512):
            tokens = self.sd.tokenizer(
                texts[start : start + 512], padding="max_length", truncation=True, return_tensors="pt"
            )
            read = self.sd.text_encoder(tokens.input_ids.to(norm.weight.device)).last_hidden_state
            found.append(((read - norm.bias) / norm.weight).flatten(1))
        return torch.cat(found)[[different[caption] for caption in captions]]

    @property
    def norm(self) -> torch.nn.LayerNorm:
        encoder = self.sd.text_encoder
        return getattr(encoder, "text_model", encoder).final_layer_norm

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return (self.states(captions) - self.mean) @ self.basis.T / self.basis[0].square().sum()

    @torch.no_grad()
    def write_to(self, decoder: torch.nn.Module) -> None:
        """Make the decoder's projection of embeddings the way back; more tokens than the text has are its last one."""
        projection, norm = decoder.encoder_hid_proj, self.norm
        size, count = norm.weight.shape[0], projection.num_image_text_embeds
        for linear, x in ((projection.image_embeds.weight, self.basis.T), (projection.image_embeds.bias, self.mean)):
            tokens = x.unflatten(0, (-1, size))  # (T, D, ...)
            last = tokens[-1:].expand(count - len(tokens), *tokens.shape[1:])
            linear.copy_(torch.cat([tokens, last]).flatten(0, 1))
        projection.norm.load_state_dict(norm.state_dict())


@dataclass
class Data:
    """What all models are trained from."""

    args: argparse.Namespace
    sd: StableDiffusionPipeline
    text: CLIPTextModelWithProjection
    encoder: CLIPVisionModelWithProjection
    code: CaptionCode
    canvas: Canvas

    @cached_property
    def scenes(self) -> list[Scene]:
        rng = random.Random(-5)
        return [sample_scene(rng) for _ in range(self.args.scenes)]

    @cached_property
    def images(self) -> torch.Tensor:
        """A render of each scene, `(count, 64, 64, 3)`."""
        found = torch.empty(len(self.scenes), 64, 64, 3, dtype=torch.uint8)
        for i, scene in enumerate(tqdm(self.scenes, desc="renders")):
            found[i] = torch.from_numpy(np.asarray(self.canvas.render(scene, random.Random(i))))
        return found

    def pixels(self, indices: list[int] | range, drawn: bool = False) -> torch.Tensor:
        """Renders or drawings, `(N, 3, 64, 64)` in [-1, 1]."""
        images = (self.drawings if drawn else self.images)[list(indices)]
        return images.permute(0, 3, 1, 2).to(self.args.device).float() / 127.5 - 1

    @cached_property
    def codes(self) -> torch.Tensor:
        """`(count, d)` of the scenes' full captions, in their first wording: their least-squares fit by a sum of one
        vector a value."""
        codes = self.code([scene.caption() for scene in self.scenes])
        shows = torch.zeros(len(codes), len(CONCEPTS), dtype=torch.float64)
        columns = {(factor, CONCEPT_VALUES[name]): i for i, (name, factor) in enumerate(CONCEPTS.items())}
        for row, scene in zip(shows, self.scenes, strict=True):
            row[[columns[pair] for pair in asdict(scene).items() if pair[1] is not None]] = 1
        vectors = torch.linalg.lstsq(shows, codes.double().cpu(), driver="gelsd").solution
        return (shows @ vectors).to(codes)

    @cached_property
    def drawings(self) -> torch.Tensor:
        """Pictures of the first scenes as emoji-sd draws them over noised renders, `(drawings, 64, 64, 3)`."""
        pipe = StableDiffusionImg2ImgPipeline(**self.sd.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        found = torch.empty(self.args.drawings, 64, 64, 3, dtype=torch.uint8)
        for start in tqdm(range(0, len(found), 32), desc="drawings"):
            indices = range(start, min(start + 32, len(found)))
            made = pipe(
                [self.scenes[i].caption(i % 3) for i in indices], self.pixels(indices) / 2 + 0.5, strength=0.6,
                num_inference_steps=7, guidance_scale=1.0, output_type="pt",
                generator=torch.Generator().manual_seed(start),
            ).images  # fmt: skip
            found[start : start + len(made)] = made.mul(255).round().byte().permute(0, 2, 3, 1).cpu()
        return found

    @torch.no_grad()
    def embeds(self, count: int) -> torch.Tensor:
        """What the image tower sees in the last renders, `(count, d)`."""
        indices = range(len(self.scenes) - count, len(self.scenes))
        return torch.cat([self.encoder(self.pixels(indices[i : i + 128])).image_embeds for i in range(0, count, 128)])

    def tokens(self, captions: list[str]):
        found = self.sd.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return found.to(self.args.device)

    def like(self, **changes: int | float) -> argparse.Namespace:
        """The arguments of the script with others in their place."""
        return argparse.Namespace(**{**vars(self.args), **changes})


def data_of(args: argparse.Namespace) -> Data:
    def load(cls, name: str):
        return cls.from_pretrained(args.world / "emoji-clip" / name).to(args.device)

    sd = StableDiffusionPipeline.from_pretrained(args.world / "emoji-sd", safety_checker=None).to(args.device)
    sd.to(torch.float32)
    encoder = load(CLIPVisionModelWithProjection, "image_encoder").float()
    code = CaptionCode.of(sd, encoder.config.projection_dim, args.world / "training" / "kandinsky-code.safetensors")
    text = load(CLIPTextModelWithProjection, "text_encoder").float().eval()
    return Data(args, sd, text, encoder, code, Canvas(args.world / "sprites.npz"))


def train_image_tower(data: Data) -> None:
    """By the squared error of the code of the full caption, on renders and, a quarter, drawings; of an image of zeros,
    which Kandinsky's pipelines take for nothing, that of the empty caption."""
    args, encoder = data.args, data.encoder
    codes, nothing, few = data.codes[: -args.held_out], data.code([""]), args.batch // 4
    with torch.no_grad():  # begin with the caption's average
        encoder.visual_projection.weight.mul_(0.1)

    def losses(step: int, rng: random.Random) -> Losses:
        picks = [rng.randrange(args.drawings) for _ in range(few)]
        picks += [rng.randrange(len(codes)) for _ in range(args.batch - few)]
        pixels = torch.cat([data.pixels(picks[:few], drawn=True), data.pixels(picks[few:])])
        pixels = torch.where(torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5, pixels, pixels.flip(-1))
        wanted = torch.cat([codes[picks], nothing])
        seen = encoder(torch.cat([pixels, torch.zeros_like(pixels[:1])])).image_embeds.float()
        error = F.mse_loss(seen, wanted)
        return {"loss": error, "fvu": (error / (wanted - wanted.mean(0)).square().mean()).detach()}

    fit(encoder, losses, args, name="kandinsky-tower", every=50, weight_decay=0.05)


def trained_prior(data: Data, scheduler: UnCLIPScheduler) -> PriorTransformer:
    """By the squared error of the code that it predicts from a noisy one and a caption that may leave parts out."""
    args, device = data.args, data.args.device
    torch.manual_seed(0)
    prior = new_prior(data.text, data.codes).to(device)
    alpha_bar = scheduler.alphas_cumprod.to(device)

    def losses(step: int, rng: random.Random) -> Losses:
        picks = [rng.randrange(len(data.scenes)) for _ in range(128)]
        captions = ["" if rng.random() < 0.1 else sample_caption(data.scenes[i], rng) for i in picks]
        tokens = data.tokens(captions)
        with torch.no_grad():
            read = data.text(tokens.input_ids)
        x = (data.codes[picks] - prior.clip_mean) / prior.clip_std
        t = torch.randint(0, len(alpha_bar), (len(x),)).to(device)
        a = alpha_bar[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * torch.randn(x.shape).to(device)
        mask = tokens.attention_mask.bool()
        found = prior(noisy, t, read.text_embeds, read.last_hidden_state, mask).predicted_image_embedding
        return {"loss": F.mse_loss(found.float(), x)}

    fit(prior, losses, data.like(steps=args.prior_steps, lr=2e-3), name="kandinsky-prior", every=50)
    return prior


def trained_sae(data: Data) -> tuple[SparseAutoencoder, dict[str, float]]:
    """An SAE of captions' codes and of embeddings of renders, with its statistics, and its figures on those of scenes
    held out; `tower_fvu` is the share of their codes' variance that the image tower misses."""
    held_out = data.args.held_out
    embeds = data.embeds(2 * held_out)
    seen = torch.cat([data.codes[:-held_out], embeds[:-held_out]]).cpu()
    held = torch.cat([data.codes[-held_out:], embeds[-held_out:]]).cpu()
    provenance = {"site": {"path": "image_embeds"}, "base_model": "emoji-kandinsky"}
    torch.manual_seed(0)
    sae = TopKSAE(seen.shape[1], data.args.latents, data.args.k, provenance=provenance)
    train_on_rows(seen, sae, TrainingConfig(data.args.sae_steps, 1024, lr=2e-3, decay=0.5, dead_after=50_000))
    statistics, meter = StatisticsAccumulator(sae.n_latents), ReconstructionMeter(sae)
    with torch.no_grad():
        for rows in seen.split(2048):
            statistics.add(0.0, sae.encode_sparse(rows))
    meter.add(0.0, held)
    sae.statistics = statistics.finish()
    figures = meter.figures()
    figures["dead"] = float(sae.statistics.dead.float().mean())
    codes, embeds = held.chunk(2)
    figures["tower_fvu"] = float((embeds - codes).square().sum() / (codes - codes.mean(0)).square().sum())
    return sae, {name: round(figures[name], 5) for name in ("fvu", "cosine", "l0", "dead", "tower_fvu")}


def main() -> None:
    parser = arguments(__doc__, steps=700, batch=128, lr=8e-4)
    parser.add_argument("--scenes", type=int, default=16384)
    parser.add_argument("--drawings", type=int, default=2048, help="pictures by emoji-sd that the image tower sees too")
    parser.add_argument("--prior-steps", type=int, default=1000)
    parser.add_argument("--sae-steps", type=int, default=2000)
    parser.add_argument("--latents", type=int, default=128)
    parser.add_argument("--k", type=int, default=6)
    parser.set_defaults(held_out=HELD_OUT)
    args = parse(parser, scenes=256, drawings=8, prior_steps=2, sae_steps=4, held_out=64)
    data, out = data_of(args), args.world / "emoji-kandinsky"
    train_image_tower(data)
    data.encoder.save_pretrained(out / "image_encoder")
    decoder = new_decoder(data.sd.unet, data.encoder.config.projection_dim)
    data.code.write_to(decoder)
    learned = {name: x.contiguous() for name, x in decoder.state_dict().items() if reads_the_embedding(name)}
    save_file(learned, out / "decoder.safetensors")
    sae, figures = trained_sae(data)
    print("SAE", figures, flush=True)
    sae.save_pretrained(out / "sae")
    (out / "sae" / "held_out.json").write_text(json.dumps(figures, indent=1) + "\n")
    scheduler = UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0)
    trained_prior(data, scheduler).save_pretrained(out / "prior")
    scheduler.save_pretrained(out / "prior_scheduler")


if __name__ == "__main__":
    main()
