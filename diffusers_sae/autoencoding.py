"""Encodes images to a pipeline's latents: by its autoencoder's encoder, or nearer to the image by decoder inversion.

What the pipeline does to latents before it decodes them (scale, shift, statistics of each channel, fp32) is observed,
since pipelines and their subclasses differ in it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConsistencyDecoderVAE
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents

from .errors import InputError
from .families import denoiser_of
from .inverse_schedulers import NoSteps
from .twins import stock_with_components

RATE = 0.02
"""Adam's step, in deviations of an image's latents."""
PROBE = 1024.0
"""Latents that show a pipeline's scale; so large that rounding of its shift does not matter."""


@dataclass(frozen=True)
class DecoderInput:
    """What a pipeline hands its decoder: `scale * latents + shift`, each `(1, C, 1, 1)` in fp32, computed in `dtype`.

    `dtype` is that of the autoencoder meanwhile, which some pipelines cast to fp32.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    dtype: torch.dtype

    def latents(self, decoded: torch.Tensor) -> torch.Tensor:
        """The latents for which the decoder is handed `decoded (N, C, h, w)`."""
        return (decoded.float() - self.shift) / self.scale


@torch.no_grad()
def encode_images(pipe: Any, images: torch.Tensor, iterations: int = 0) -> torch.Tensor:
    """The latents `(N, C, h, w)` of images `(N, 3, H, W)` in [0, 1], as the pipeline's denoiser has them.

    Args:
        pipe: a stock pipeline, or one whose plan rests meanwhile.
        images: in [0, 1].
        iterations: of the decoder's inversion, which begins at the mode of the encoder's distribution: 0 is that mode.

    Raises:
        InputError: the pipeline or its autoencoder cannot encode images. Nothing is changed.
    """
    vae = pipe.vae
    if iterations and isinstance(vae, ConsistencyDecoderVAE):
        raise InputError(
            "ConsistencyDecoderVAE draws noise to decode, so that its decoder cannot be inverted; "
            "pass decoder_iterations=0, or use an AutoencoderKL."
        )
    decoder_input = observe_decoder_input(pipe, images.shape[-2], images.shape[-1])
    overflows = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    in_float32 = overflows or bool(iterations) or decoder_input.dtype == torch.float32
    with _dtype_kept(vae):
        if in_float32 and vae.dtype != torch.float32:
            vae.to(torch.float32)
        wanted = (2 * images - 1).to(pipe._execution_device, vae.dtype)
        encoded = _encode(vae, wanted)
        if encoded.shape[1] != decoder_input.scale.shape[1]:
            raise InputError(
                f"The autoencoder has latents of {encoded.shape[1]} channels and the denoiser takes "
                f"{decoder_input.scale.shape[1]}; pass a pipeline whose denoiser takes latents alone."
            )
        if iterations:
            encoded = _invert_decoder(vae, encoded, wanted, iterations)
    denoiser: Any = denoiser_of(pipe)[1]
    return decoder_input.latents(encoded).to(denoiser.dtype)


def observe_decoder_input(pipe: Any, height: int, width: int) -> DecoderInput:
    """Run the pipeline without a step, from latents of `height x width` images to what it hands its decoder.

    Raises:
        InputError: it is not the latents, scaled and shifted for each channel.
    """
    latents = _probes(pipe, height, width)
    handed, dtype = _handed_to_decoder(pipe, latents, height, width)
    if handed.shape == latents.shape:
        zero, high, low, pattern = handed.float().split(1)
        shift, scale = zero[..., :1, :1], (high - low)[..., :1, :1] / (2 * PROBE)
        error = (scale * latents[3:].to(scale.device) + shift - pattern).abs().max()
        if (scale != 0).all() and float(error) <= 0.02 * (scale.abs().max() + shift.abs().max()):
            return DecoderInput(scale, shift, dtype)
    raise InputError(
        f"{type(pipe).__name__} does more to latents before it decodes them than to scale and shift each channel, "
        "so that images cannot be encoded for it; pass a pipeline that decodes as the stock class does."
    )


def _probes(pipe: Any, height: int, width: int) -> torch.Tensor:
    """Latents `(4, C, h, w)`: all 0, all `PROBE`, all `-PROBE`, and different ones at every position."""
    denoiser: Any = denoiser_of(pipe)[1]
    shape = denoiser.config.in_channels, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    pattern = torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
    return torch.stack([torch.zeros(shape), torch.full(shape, PROBE), torch.full(shape, -PROBE), pattern])


class _Reached(Exception):
    """The pipeline has reached its decoder."""


class _Decoder:
    """Stands in for a pipeline's autoencoder, and ends the call where it would decode."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        if name == "_vae":
            raise AttributeError(name)  # not there yet, while this is being copied
        return getattr(self._vae, name)

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(latents, self._vae.dtype)


def _handed_to_decoder(pipe: Any, latents: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.dtype]:
    """What the pipeline would decode of latents, and the autoencoder's dtype at that point."""
    twin = stock_with_components(pipe, scheduler=NoSteps(pipe.scheduler), vae=_Decoder(pipe.vae))
    twin.set_progress_bar_config(disable=True)
    # no step needs a prompt, so that the text encoders need not run
    embeds = {"prompt_embeds": torch.zeros(len(latents), 1, 1), "pooled_prompt_embeds": torch.zeros(len(latents), 1)}
    taken = inspect.signature(type(twin).__call__).parameters
    embeds = {name: tensor for name, tensor in embeds.items() if name in taken}
    with _dtype_kept(pipe.vae):
        try:
            twin(latents=latents, height=height, width=width, num_inference_steps=1, guidance_scale=1.0, **embeds)
        except _Reached as reached:
            return reached.args
    raise InputError(f"{type(pipe).__name__} does not decode latents with its autoencoder; pass a stock pipeline.")


def _encode(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The mode of the encoder's distribution, or the latents that it has instead of one, as AutoencoderTiny does."""
    try:
        return retrieve_latents(vae.encode(images), sample_mode="argmax")
    except AttributeError:
        raise InputError(
            f"{type(vae).__name__} encodes images to no latents that diffusers' pipelines could take; "
            "pass a pipeline with an AutoencoderKL or an AutoencoderTiny."
        ) from None


@torch.enable_grad()
def _invert_decoder(vae: Any, latents: torch.Tensor, wanted: torch.Tensor, iterations: int) -> torch.Tensor:
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
def _dtype_kept(module: torch.nn.Module) -> Iterator[None]:
    """Whatever the module is cast to meanwhile, it is as it was afterwards."""
    dtype: torch.dtype = module.dtype  # type: ignore[assignment]
    try:
        yield
    finally:
        if module.dtype != dtype:
            module.to(dtype)
