"""The layers and networks of StyleGAN2 (Karras et al. 2020, 1912.04958), with the names that NVlabs gives them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .stylegan2_ops import (
    activated,
    clamped,
    convolved,
    convolved_up,
    low_pass_filter,
    modulated_weights,
    normalize_2nd_moment,
    upsample,
)


class FullyConnected(nn.Module):
    """`x Wᵀ + b` with an equalised rate: weights are stored at unit scale over `lr_multiplier` and scaled when used."""

    def __init__(
        self, inputs: int, outputs: int, lr_multiplier: float = 1.0, bias: float = 0.0, active: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.weight_gain, self.bias_gain = lr_multiplier / inputs**0.5, lr_multiplier
        self.active = active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return activated(y) if self.active else y


class Mapping(nn.Module):
    """The mapping network: z `(B, z_dim)`, and for labelled data c `(B, c_dim)`, to w `(B, num_ws, w_dim)`.

    Truncation (section 3 of the paper on StyleGAN) is its last step: `w_avg + psi (w - w_avg)` in the first
    `truncation_cutoff` layers, or in all.
    """

    w_avg: torch.Tensor

    def __init__(
        self, z_dim: int, c_dim: int, w_dim: int, num_ws: int, num_layers: int, lr_multiplier: float,
        embed_features: int | None, layer_features: int | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_ws, self.num_layers, self.dim = num_ws, num_layers, w_dim
        embedded = (embed_features or w_dim) if c_dim else 0
        self.embed = FullyConnected(c_dim, embedded) if c_dim else None
        widths = [z_dim + embedded, *[layer_features or w_dim] * (num_layers - 1), w_dim]
        for i in range(num_layers):
            self.add_module(f"fc{i}", FullyConnected(widths[i], widths[i + 1], lr_multiplier, active=True))
        self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> torch.Tensor:
        x = normalize_2nd_moment(z)
        if self.embed is not None:
            x = torch.cat([x, normalize_2nd_moment(self.embed(c))], 1)
        for i in range(self.num_layers):
            x = self.get_submodule(f"fc{i}")(x)
        w = x[:, None].repeat(1, self.num_ws, 1)
        return w if truncation_psi == 1 else self._truncated(w, truncation_psi, truncation_cutoff)

    def _truncated(self, w: torch.Tensor, psi: float, cutoff: int | None) -> torch.Tensor:
        return torch.cat([self.w_avg.lerp(w[:, :cutoff], psi), w[:, w.shape[1] if cutoff is None else cutoff :]], 1)


class StyleSpace(nn.Module):
    """Passes w `(B, num_ws, w_dim)` on. Every image goes through it, so that it is the site `w`."""

    def __init__(self, w_dim: int) -> None:
        super().__init__()
        self.dim = w_dim

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w


class SynthesisLayer(nn.Module):
    """A modulated 3 x 3 convolution with noise, bias and leaky ReLU; `up` doubles height and width."""

    noise_const: torch.Tensor
    resample_filter: torch.Tensor

    def __init__(
        self, inputs: int, outputs: int, w_dim: int, resolution: int, up: bool, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.out_channels, self.resolution, self.up, self.conv_clamp = outputs, resolution, up, conv_clamp
        self.affine = FullyConnected(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", low_pass_filter())

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, noise_mode: str = "const", generator: Any = None
    ) -> torch.Tensor:
        kernels = modulated_weights(self.weight, self.affine(w))
        y = convolved_up(x, kernels, self.resample_filter) if self.up else convolved(x, kernels)
        if noise_mode != "none":
            y = y + self.noise_strength * self._noise(y, noise_mode, generator)
        return activated(y + self.bias[:, None, None], self.conv_clamp)

    def _noise(self, y: torch.Tensor, mode: str, generator: Any) -> torch.Tensor:
        if mode == "const":
            return self.noise_const
        shape = (len(y), 1, self.resolution, self.resolution)
        return randn_tensor(shape, generator=generator, device=y.device, dtype=y.dtype)


class ToRGB(nn.Module):
    """A modulated 1 x 1 convolution without demodulation: features to an image."""

    def __init__(self, inputs: int, outputs: int, w_dim: int, conv_clamp: float | None) -> None:
        super().__init__()
        self.out_channels, self.conv_clamp = outputs, conv_clamp
        self.affine = FullyConnected(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_gain = inputs**-0.5

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        kernels = modulated_weights(self.weight, self.affine(w) * self.weight_gain, demodulate=False)
        return clamped(convolved(x, kernels) + self.bias[:, None, None], self.conv_clamp)


class SynthesisBlock(nn.Module):
    """The layers of one resolution, and its part of the image; the first one starts from a learnt constant."""

    resample_filter: torch.Tensor

    def __init__(
        self, inputs: int, outputs: int, w_dim: int, resolution: int, image_channels: int, conv_clamp: float | None
    ) -> None:
        super().__init__()
        self.out_channels = outputs
        self.first = inputs == 0
        self.register_buffer("resample_filter", low_pass_filter())
        if self.first:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(inputs, outputs, w_dim, resolution, True, conv_clamp)
        self.conv1 = SynthesisLayer(outputs, outputs, w_dim, resolution, False, conv_clamp)
        self.torgb = ToRGB(outputs, image_channels, w_dim, conv_clamp)

    @property
    def convolutions(self) -> int:
        """How many layers of w it takes for itself; it also looks at the next block's first, for its colours."""
        return 1 if self.first else 2

    def forward(
        self,
        x: torch.Tensor | None,
        image: torch.Tensor | None,
        w: torch.Tensor,
        noise_mode: str = "const",
        generator: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and image so far, and `w (B, convolutions + 1, w_dim)`, to those at this resolution."""
        styles = iter(w.unbind(1))
        start = (
            self.const.expand(len(w), -1, -1, -1) if x is None else self.conv0(x, next(styles), noise_mode, generator)
        )
        x = self.conv1(start, next(styles), noise_mode, generator)
        colours = self.torgb(x, next(styles))
        return x, colours if image is None else upsample(image, self.resample_filter) + colours


class Synthesis(nn.Module):
    """The synthesis network with skip connections: w `(B, num_ws, w_dim)` to images `(B, channels, R, R)`."""

    def __init__(
        self, w_dim: int, img_resolution: int, img_channels: int, channel_base: int, channel_max: int,
        conv_clamp: float | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resolutions = [2**i for i in range(2, img_resolution.bit_length())]
        widths = {r: min(channel_base // r, channel_max) for r in self.resolutions}
        for r in self.resolutions:
            block = SynthesisBlock(widths.get(r // 2, 0), widths[r], w_dim, r, img_channels, conv_clamp)
            self.add_module(f"b{r}", block)
        self.num_ws = 2 * len(self.resolutions)

    def forward(self, w: torch.Tensor, noise_mode: str = "const", generator: Any = None) -> torch.Tensor:
        x = image = None
        first = 0
        for r in self.resolutions:
            block: Any = self.get_submodule(f"b{r}")
            styles = w[:, first : first + block.convolutions + 1]
            x, image = block(x, image, styles, noise_mode, generator)
            first += block.convolutions
        assert image is not None
        return image
