"""A variational autoencoder (Kingma and Welling, 1312.6114) whose latent is one vector an image, as a diffusers model.

All its layers are linear or small perceptrons between an analysis and a synthesis of the pixels, which may start at
their principal components (`vector_vae_training`); so it trains on a processor in minutes.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..errors import InputError


class VectorGaussian(DiagonalGaussianDistribution):
    """Normal distributions over vectors, of parameters `(N, 2 d)`: means, then log variances."""

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> torch.Tensor:
        """The divergence of each to `other`, or to the standard normal (1312.6114, appendix B), `(N,)` in nats."""
        mean, var, logvar = (other.mean, other.var, other.logvar) if other is not None else (0.0, 1.0, 0.0)
        ratio = ((self.mean - mean) ** 2 + self.var) / var
        return 0.5 * (ratio - 1.0 + logvar - self.logvar).sum(-1)


class LatentSpace(nn.Module):
    """Passes latents `(N, 1, d)` on. Every image that is decoded goes through it, so that it is the site `latent`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z


class Residual(nn.Module):
    """`x + perceptron(norm(x))` over vectors `(N, width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear_2(nn.functional.silu(self.linear_1(self.norm(x))))


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), Residual(hidden), nn.LayerNorm(hidden), nn.Linear(hidden, outputs))


class VectorVAE(ModelMixin, ConfigMixin):
    """Images to vectors and back, with the face of diffusers' `AutoencoderKL`.

    Args:
        sample_size: height and width of the images.
        in_channels: colours.
        latent_dim: width d of the latent.
        components: what the pixels are analysed into, linearly, and synthesised from.
        hidden: width inside encoder and decoder.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        latent_dim: int = 128,
        components: int = 384,
        hidden: int = 768,
    ) -> None:
        super().__init__()
        sizes = {
            "sample_size": sample_size, "in_channels": in_channels, "latent_dim": latent_dim,
            "components": components, "hidden": hidden,
        }  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise InputError(f"{name}={value} is no size; pass 1 or more.")
        self.image_shape = in_channels, sample_size, sample_size
        pixels = in_channels * sample_size**2
        self.analysis = nn.Linear(pixels, components)
        self.encoder = _perceptron(components, hidden, 2 * latent_dim)
        self.latent = LatentSpace(latent_dim)
        self.decoder = _perceptron(latent_dim, hidden, components)
        self.synthesis = nn.Linear(components, pixels)

    @apply_forward_hook
    def encode(self, x: torch.Tensor) -> AutoencoderKLOutput:
        """Posteriors of images `(N, channels, R, R)` in [-1, 1]: `.latent_dist` with `mean` and `logvar (N, d)`.

        Raises `InputError` for images of another shape.
        """
        if x.shape[1:] != self.image_shape:
            raise InputError(
                f"The images have shape {tuple(x.shape)}; this VAE takes (N, {', '.join(map(str, self.image_shape))})."
            )
        return AutoencoderKLOutput(latent_dist=self.posterior(self.analysis(x.flatten(1))))

    def posterior(self, components: torch.Tensor) -> VectorGaussian:
        """Posteriors of images that are analysed already, `(N, components)`."""
        return VectorGaussian(self.encoder(components))

    @apply_forward_hook
    def decode(self, z: torch.Tensor) -> DecoderOutput:
        """Images `.sample (N, channels, R, R)`, about [-1, 1], of latents `(N, d)`.

        Raises `InputError` for latents of another shape.
        """
        if z.ndim != 2 or z.shape[1] != self.latent.dim:
            raise InputError(f"The latents have shape {tuple(z.shape)}; this VAE takes (N, {self.latent.dim}).")
        passed = self.latent(z[:, None])[:, 0]
        return DecoderOutput(sample=self.synthesis(self.decoder(passed)).unflatten(1, self.image_shape))

    def forward(self, x: torch.Tensor | None = None, *, z: torch.Tensor | None = None) -> torch.Tensor:
        """Images `(N, channels, R, R)` from latents `z`, or from the means of the posteriors of images `x`."""
        if z is None:
            assert x is not None
            z = self.encode(x).latent_dist.mean
        return self.decode(z).sample
