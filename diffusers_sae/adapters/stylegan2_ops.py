"""The equations of StyleGAN2's layers (Karras et al. 2020, 1912.04958), as functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

LRELU_SLOPE = 0.2
LRELU_GAIN = 2**0.5
"""What keeps the variance of a leaky ReLU's output at that of its input."""


def normalize_2nd_moment(x: torch.Tensor) -> torch.Tensor:
    """Rows `(B, n)` scaled to a mean square of 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def activated(x: torch.Tensor, clamp: float | None = None) -> torch.Tensor:
    """Leaky ReLU with its gain, then kept inside ±clamp."""
    return clamped(F.leaky_relu(x, LRELU_SLOPE) * LRELU_GAIN, clamp)


def clamped(x: torch.Tensor, clamp: float | None) -> torch.Tensor:
    return x if clamp is None else x.clamp(-clamp, clamp)


def low_pass_filter() -> torch.Tensor:
    """The outer product of [1, 3, 3, 1] with itself, with the sum 1: `(4, 4)`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    square = taps[:, None] * taps
    return square / square.sum()


def upsample(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """`(B, C, H, W)` to `(B, C, 2H, 2W)`: zeros between the pixels, then the filter `taps (4, 4)` with gain 4."""
    channels = x.shape[1]
    kernel = (4 * taps).to(x.dtype).expand(channels, 1, 4, 4)
    return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


def blur(x: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """`(B, C, H+1, W+1)` to `(B, C, H, W)`: convolution with `taps (4, 4)`, one zero around the map."""
    channels = x.shape[1]
    kernel = taps.flip((0, 1)).to(x.dtype).expand(channels, 1, 4, 4)
    return F.conv2d(x, kernel, padding=1, groups=channels)


def modulated_weights(weight: torch.Tensor, styles: torch.Tensor, demodulate: bool = True) -> torch.Tensor:
    """A kernel for each image, `(B, out, in, k, k)`, from one kernel `(out, in, k, k)` and styles `(B, in)`.

    Equations 1 and 3 of the paper: `w' = s w`, `w'' = w' / sqrt(Σ w'² + ε)`, the sum over inputs and places.
    """
    modulated = weight * styles[:, None, :, None, None]
    if not demodulate:
        return modulated
    return modulated * (modulated.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()


def convolved(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Every image `(B, in, H, W)` with its own of `kernels (B, out, in, k, k)`: `(B, out, H, W)`."""
    batch, _, height, width = x.shape
    grouped = F.conv2d(
        x.reshape(1, -1, height, width), kernels.flatten(0, 1), padding=kernels.shape[-1] // 2, groups=batch
    )
    return grouped.unflatten(1, (batch, -1))[0]


def convolved_up(x: torch.Tensor, kernels: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """`convolved` at twice the height and width: a transposed convolution, then the filter with gain 4."""
    batch, _, height, width = x.shape
    grouped = F.conv_transpose2d(
        x.reshape(1, -1, height, width), kernels.transpose(1, 2).flatten(0, 1), stride=2, groups=batch
    )  # (1, B*out, 2H+1, 2W+1)
    return blur(grouped.unflatten(1, (batch, -1))[0], 4 * taps)
