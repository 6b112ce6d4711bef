"""What a `VectorVAE` starts from, and what it minimises."""

from __future__ import annotations

import torch

from ..errors import InputError
from .vector_vae import VectorVAE

SITE = {"path": "autoencoder.latent", "kind": "output", "stream": "image", "layout": "positions"}
"""What the config of an SAE for the latent says of its site."""
OVERSAMPLING = 32
"""Components that are found beyond those that are kept, which makes these more exact."""


@torch.no_grad()
def start_at_principal_components(vae: VectorVAE, images: torch.Tensor, seed: int = 0) -> None:
    """Let analysis and synthesis be the principal components of images `(N, channels, R, R)` in [-1, 1], in place.

    The components of these images then have mean 0 and variance 1 (Halko et al., 0909.4061). Both layers are left
    out of the training that follows.

    Raises `InputError` if the images are fewer than twice the components.
    """
    count = vae.config.components
    if len(images) < 2 * count:
        raise InputError(f"{len(images)} images cannot tell {count} components; pass {2 * count} images or more.")
    pixels = images.flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        more = min(count + OVERSAMPLING, *pixels.shape)
        _, singular, directions = torch.pca_lowrank(pixels, more, niter=1)
    singular, directions = singular[:count], directions[:, :count]  # (k,), (pixels, k)
    mean, deviations = pixels.mean(0), (singular / (len(pixels) - 1) ** 0.5).clamp(min=1e-6)
    vae.analysis.weight.copy_(directions.T / deviations[:, None])
    vae.analysis.bias.copy_(-vae.analysis.weight @ mean)
    vae.synthesis.weight.copy_(directions * deviations)
    vae.synthesis.bias.copy_(mean)
    for layer in (vae.analysis, vae.synthesis):
        layer.requires_grad_(False)


@torch.no_grad()
def analysed(vae: VectorVAE, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The components `(N, k)` of images, and the sum of squares of an image's pixels that is outside of them."""
    components = vae.analysis(images.flatten(1))
    outside = (vae.synthesis(components) - images.flatten(1)).square().sum(-1).mean()
    return components, float(outside)


def negative_elbo(vae: VectorVAE, components: torch.Tensor, outside: float) -> dict[str, torch.Tensor]:
    """What to minimise on components `(N, k)`: `loss` in nats a pixel, of `mse` a pixel and `kl` in nats an image.

    The decoder's variance is the one that is best for the batch (Rybkin et al., 2006.13202), so that the
    loss is `log(mse) / 2 + kl / pixels` and needs no weight. Errors of the components are errors of the pixels, since
    the columns of the synthesis are orthogonal.
    """
    dist = vae.posterior(components)
    scales = vae.synthesis.weight.square().sum(0)  # (k,)
    error = (vae.decoder(dist.sample()) - components).square() @ scales  # (N,)
    pixels = vae.synthesis.out_features
    mse, kl = (error.mean() + outside) / pixels, dist.kl().mean()
    return {"loss": mse.log() / 2 + kl / pixels, "mse": mse.detach(), "kl": kl.detach()}
