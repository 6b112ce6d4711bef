"""A vector-latent VAE as a diffusers pipeline, so that SAEs are loaded, turned and captured there as in any other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..errors import InputError
from ..unit_range import as_unit_range, rgb_image
from .vector_vae import VectorVAE

OUTPUT_TYPES = ("pil", "pt", "np")


class VectorVAEPipeline(DiffusionPipeline):
    """Images through a `VectorVAE`.

    The site `latent` is what is decoded, one row an image: the mean of an image's posterior, a latent that is given,
    or one that is drawn.
    """

    model_cpu_offload_seq = "autoencoder"

    def __init__(self, autoencoder: VectorVAE) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, resample="bilinear", do_convert_rgb=True)

    @torch.no_grad()
    def encode(self, image: Any) -> torch.Tensor:
        """The means of the posteriors, `(N, d)`, of a PIL image, an array or a tensor, or a list of them.

        Floating-point numbers are in [0, 1]; uint8 and uint16 are divided by their type's maximum. Images of another
        size are resized. Raises `InputError` for what is no image.
        """
        size = self.autoencoder.config.sample_size
        images = [_in_range(each) for each in image] if isinstance(image, (list, tuple)) else _in_range(image)
        try:
            pixels = self.image_processor.preprocess(images, height=size, width=size)
        except (ValueError, TypeError, AttributeError, IndexError):
            raise InputError(
                f"image is {_told(image)}; pass a PIL image, an array or a tensor in [0, 1], or a list of one kind."
            ) from None
        return self.autoencoder.encode(pixels.to(self._execution_device, self.autoencoder.dtype)).latent_dist.mean

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        latents: torch.Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Decode images.

        Args:
            image: what is reconstructed, as `encode` takes it.
            latents: instead of images: `(d,)` or `(N, d)`.
            batch_size: without either, how many are drawn from the standard normal; by default one.
            generator: draws them.
            output_type: `pil`; `pt`, `(N, channels, R, R)` in [0, 1]; or `np`, `(N, R, R, channels)` in [0, 1].

        Raises:
            InputError: an argument is wrong, or does not fit the VAE.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUT_TYPES)}.")
        z = self._latents(image, latents, batch_size, generator)
        images = self.autoencoder(z=z.to(self._execution_device, self.autoencoder.dtype))
        finished = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=finished) if return_dict else (finished,)

    def _latents(self, image: Any, latents: Any, batch_size: int | None, generator: Any) -> torch.Tensor:
        given = [n for n, v in (("image", image), ("latents", latents), ("batch_size", batch_size)) if v is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} were passed; pass one of image, latents and batch_size.")
        if image is not None:
            return self.encode(image)
        width = self.autoencoder.config.latent_dim
        if latents is None:
            if batch_size is not None and batch_size < 1:
                raise InputError(f"batch_size={batch_size} makes no image; pass 1 or more.")
            return randn_tensor((batch_size or 1, width), generator=generator, device=self._execution_device)
        if not isinstance(latents, torch.Tensor) or latents.ndim not in (1, 2) or latents.shape[-1] != width:
            raise InputError(f"latents must be a tensor ({width},) or (images, {width}), not {_told(latents)}.")
        if not torch.isfinite(latents).all():
            raise InputError("latents hold numbers that are not finite; leave those out.")
        return latents.reshape(-1, width)


def _in_range(image: Any) -> Any:
    """An image as diffusers' image processor takes it: a PIL image as RGB, and numbers in [0, 1]."""
    if isinstance(image, Image.Image):
        return rgb_image(image, "The image")
    if isinstance(image, (np.ndarray, torch.Tensor)):
        numbers = as_unit_range(image, "The image")
        return numbers if isinstance(image, torch.Tensor) else numbers.numpy()
    return image


def _told(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
