"""Train the f4 `AutoencoderKL` of emoji-sd: `python train_autoencoder.py`. Writes `emoji-sd/vae`.

Each latent channel is standardised by folding its mean and deviation over the canvas into `quant_conv` and
`post_quant_conv`, so that the scaling factor is 1 and no pipeline needs to know.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from canvas import Canvas
from diffusers import AutoencoderKL
from loop import Losses, arguments, fit, mosaic, parse, to_images, to_tensor

from diffusers_sae.demo.world import sample_scene


def new_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def standardise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold the channels' mean and deviation over `images` into the two 1 x 1 convolutions around the latents."""
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean  # (N, C, h, w)
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        c = len(mean)
        post = vae.post_quant_conv
        post.bias += (post.weight.flatten(1) * mean).sum(1)
        post.weight *= std[None, :, None, None]
        quant = vae.quant_conv  # its second half is the log variance
        quant.bias[:c] = (quant.bias[:c] - mean) / std
        quant.weight[:c] /= std[:, None, None, None]
        quant.bias[c:] -= 2 * std.log()


def main() -> None:
    args = parse(arguments(__doc__, steps=6000, batch=8, lr=1.5e-3))
    canvas = Canvas(args.world / "sprites.npz")
    vae = new_autoencoder().to(args.device, memory_format=torch.channels_last)

    def batch(rng: random.Random, n: int) -> torch.Tensor:
        return to_tensor([canvas.render(sample_scene(rng), rng) for _ in range(n)], args.device)

    held_out = batch(random.Random(-1), 24)

    def losses(step: int, rng: random.Random) -> Losses:
        x = batch(rng, args.batch)
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        # noise of a few per cent of a channel's deviation: the U-Net's latents are never exact
        z = z + 0.05 * z.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(z)
        y = vae.decode(z).sample
        l1 = F.l1_loss(y, x)
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True))
        kl = posterior.kl().mean() / z[0].numel()
        return {"loss": l1 + F.mse_loss(y, x) + edge + 1e-4 * kl, "l1": l1.detach(), "kl": kl.detach()}

    @torch.no_grad()
    def sheet():
        again = vae.decode(vae.encode(held_out).latent_dist.mean).sample
        return mosaic(to_images(torch.stack([held_out, again], 1).flatten(0, 1)), 12)

    fit(vae, losses, args, name="autoencoder", sheet=sheet, every=400, ema_decay=0.998)
    standardise(vae, batch(random.Random(-2), 512))
    vae.save_pretrained(args.world / "emoji-sd" / "vae")


if __name__ == "__main__":
    main()
