"""StyleGAN2's generator (Karras et al. 2020, 1912.04958; with ADA 2006.06676) as a diffusers model, in plain torch.

Its parameters bear the names that NVlabs' networks give them, so that conversion renames nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from ..errors import InputError
from .stylegan2_networks import Mapping, StyleSpace, Synthesis

NOISE_MODES = ("const", "random", "none")


class StyleGAN2Generator(ModelMixin, ConfigMixin):
    """StyleGAN2's generator: `mapping`, then `w`, through which every w passes, then `synthesis`.

    Args:
        z_dim, c_dim, w_dim: widths of the latents, of the labels (0: none) and of w.
        img_resolution: height and width of the images, a power of 2 from 4 on.
        img_channels: colours.
        num_layers: of the mapping network.
        lr_multiplier: of its rate, which its weights are divided by.
        channel_base, channel_max: a block of resolution r has min(channel_base / r, channel_max) channels.
        conv_clamp: bound of what layers give, or `None`.
        embed_features, layer_features: widths inside the mapping network; by default `w_dim`.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 512,
        c_dim: int = 0,
        w_dim: int = 512,
        img_resolution: int = 1024,
        img_channels: int = 3,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = 256,
        embed_features: int | None = None,
        layer_features: int | None = None,
    ) -> None:
        super().__init__()
        if img_resolution < 4 or img_resolution & (img_resolution - 1):
            raise InputError(f"img_resolution={img_resolution} is no power of 2 from 4 on; pass one, such as 256.")
        self.synthesis = Synthesis(w_dim, img_resolution, img_channels, channel_base, channel_max, conv_clamp)
        self.mapping = Mapping(
            z_dim, c_dim, w_dim, self.synthesis.num_ws, num_layers, lr_multiplier, embed_features, layer_features
        )
        self.w = StyleSpace(w_dim)

    @property
    def num_ws(self) -> int:
        """Layers of W+: two for each resolution."""
        return self.synthesis.num_ws

    @property
    def w_avg(self) -> torch.Tensor:
        """The mean of w over z, `(w_dim,)`: the centre of truncation; its image is the average image."""
        return self.mapping.w_avg

    def forward(
        self,
        z: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
        *,
        w: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
        generator: Any = None,
    ) -> torch.Tensor:
        """Images `(B, channels, R, R)`, about [-1, 1], from z `(B, z_dim)` or from w `(B, num_ws, w_dim)`.

        Truncation is a part of the mapping, so that a given w is not truncated. `c (B, c_dim)` are one-hot labels.
        `generator` is for `noise_mode="random"`: `const` takes the stored noise, `none` no noise.
        """
        if w is None:
            assert z is not None
            w = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(self.w(w), noise_mode, generator)
