"""Images to a pipeline's latents: by its autoencoder's encoder, and nearer to the image by inverting its decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .families import denoiser_of

RATE = 0.02
"""Adam's step, in deviations of an image's latents."""


@torch.no_grad()
def encoded(pipe: Any, images: torch.Tensor, iterations: int = 0) -> torch.Tensor:
    """The latents `(N, C, h, w)` of images `(N, 3, H, W)` in [0, 1], as the pipeline's denoiser has them.

    Args:
        iterations: of the decoder's inversion, which begins at the mode of the encoder's distribution: 0 is that mode.
    """
    vae = pipe.vae
    shift, factor = vae.config.shift_factor or 0.0, vae.config.scaling_factor
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    with _in_float32(vae, overflows or bool(iterations)):
        wanted = (2 * images - 1).to(pipe._execution_device, vae.dtype)
        latents = vae.encode(wanted).latent_dist.mode()
        if iterations:
            latents = _nearest(vae, latents, wanted, iterations)
    return ((latents - shift) * factor).to(denoiser_of(pipe)[1].dtype)


@torch.enable_grad()
def _nearest(vae: Any, latents: torch.Tensor, wanted: torch.Tensor, iterations: int) -> torch.Tensor:
    """Latents that decode to images nearer to `wanted` in squared error: the nearest of each image that Adam passes
    from `latents` on (decoder inversion: Hong et al., 2024, "On Exact Inversion of DPM-Solvers")."""
    scale = latents.std((1, 2, 3), keepdim=True)
    moved = torch.zeros_like(latents, requires_grad=True)
    adam = torch.optim.Adam([moved], lr=RATE)
    best, least = latents, torch.full_like(scale, torch.inf)
    for i in range(iterations + 1):
        now = latents + scale * moved
        errors = (vae.decode(now).sample - wanted).square().mean((1, 2, 3), keepdim=True)
        nearer = errors < least
        best, least = torch.where(nearer, now, best).detach(), torch.where(nearer, errors, least).detach()
        if i < iterations:
            (moved.grad,) = torch.autograd.grad(errors.sum(), moved)  # the weights get no gradient
            adam.step()
    return best


@contextmanager
def _in_float32(module: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """The module in fp32 if that is wanted, and as it was afterwards."""
    dtype: torch.dtype = module.dtype  # type: ignore[assignment]
    if not wanted or dtype == torch.float32:
        yield
        return
    try:
        module.to(torch.float32)
        yield
    finally:
        module.to(dtype)
