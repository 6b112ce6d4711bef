"""StyleGAN2 as a diffusers pipeline, so that SAEs are loaded, turned and captured there as in any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InputError
from .stylegan2 import NOISE_MODES, StyleGAN2Generator

OUTPUT_TYPES = ("pil", "pt", "np")


class StyleGAN2Pipeline(DiffusionPipeline):
    """Images from a StyleGAN2 generator.

    The site `w` is what the synthesis network gets, `(B, num_ws, w_dim)`: w **after truncation**, one row a layer of
    W+. Edits there add to the truncated w, so that a feature's strength means the same at every `truncation_psi`, and
    `truncation_psi=0` steers the average image. `tokens=[3, 4]` edits these layers of W+; without, all of W is edited.
    """

    model_cpu_offload_seq = "generator"

    def __init__(self, generator: StyleGAN2Generator) -> None:
        super().__init__()
        self.register_modules(generator=generator)
        self.image_processor = VaeImageProcessor(do_resize=False)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        class_labels: int | Sequence[int] | None = None,
        w: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: str = "const",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate images.

        Args:
            batch_size: how many; by default one, or one for each seed, latent or w.
            seeds: one an image; they give the latents that NVlabs' `generate.py --seeds` draws.
            generator: draws the latents where neither they nor seeds are given, and random noise.
            latents: z, `(B, z_dim)`.
            class_labels: a class for all images, or one for each; for generators of labelled images.
            w: instead of latents: `(w_dim,)`, `(B, w_dim)`, or `(B, num_ws, w_dim)` in W+. It is not truncated.
            truncation_psi: how far w lies from the mean, as a share; 1 changes nothing, 0 gives the average image.
            truncation_cutoff: layers of W+ that are truncated, from the first on; all by default.
            noise_mode: `const` (the stored noise), `random`, or `none`.
            output_type: `pil`; `pt`, `(B, channels, R, R)` in [0, 1]; or `np`, `(B, R, R, channels)` in [0, 1].

        Raises:
            InputError: an argument is wrong, or does not fit the generator.
        """
        for name, value, known in (("noise_mode", noise_mode, NOISE_MODES), ("output_type", output_type, OUTPUT_TYPES)):
            if value not in known:
                raise InputError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
        self._check_truncation(truncation_psi, truncation_cutoff)
        device, dtype = self._execution_device, self.generator.dtype
        given = self._checked_source(batch_size, seeds, latents, w)
        if given is None:
            shape = (batch_size or 1, self.generator.config.z_dim)
            given = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        given = given.to(device, dtype)
        if w is not None:
            images = self.generator(w=given, noise_mode=noise_mode, generator=generator)
        else:
            images = self.generator(
                given,
                self._one_hot(class_labels, len(given), device, dtype),
                truncation_psi=truncation_psi,
                truncation_cutoff=truncation_cutoff,
                noise_mode=noise_mode,
                generator=generator,
            )
        finished = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=finished) if return_dict else (finished,)

    def _check_truncation(self, psi: float, cutoff: int | None) -> None:
        if not np.isfinite(psi):
            raise InputError(f"truncation_psi={psi} is no number; pass one, such as 0.7.")
        if cutoff is not None and not 0 <= cutoff <= self.generator.num_ws:
            raise InputError(
                f"truncation_cutoff={cutoff} is out of range; this generator has 0 to {self.generator.num_ws}."
            )

    def _checked_source(
        self, batch_size: int | None, seeds: Sequence[int] | None, latents: torch.Tensor | None, w: torch.Tensor | None
    ) -> torch.Tensor | None:
        """z or w as the generator takes them, or `None` where z is to be drawn."""
        given = {"seeds": seeds, "latents": latents, "w": w}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise InputError(f"{' and '.join(named)} were passed; pass one of seeds, latents and w.")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size={batch_size} makes no image; pass 1 or more.")
        if not named:
            return None
        if seeds is not None:
            found = self._from_seeds(seeds)
        else:
            found = self._checked_z(latents) if w is None else self._wide(w)
        if batch_size not in (None, len(found)):
            raise InputError(f"batch_size={batch_size} does not fit {named[0]} for {len(found)} images; leave it out.")
        return found

    def _from_seeds(self, seeds: Sequence[int]) -> torch.Tensor:
        z_dim = self.generator.config.z_dim
        if not seeds or not all(isinstance(s, (int, np.integer)) and 0 <= s < 2**32 for s in seeds):
            raise InputError(
                f"seeds={seeds!r} are no whole numbers from 0 to 2^32 - 1; pass a list of them, such as [1, 2]."
            )
        return torch.from_numpy(np.stack([np.random.RandomState(s).randn(z_dim) for s in seeds]))

    def _checked_z(self, latents: Any) -> torch.Tensor:
        z_dim = self.generator.config.z_dim
        if not isinstance(latents, torch.Tensor) or latents.ndim != 2 or latents.shape[1] != z_dim:
            raise InputError(f"latents must be a tensor (images, {z_dim}), not {_told(latents)}.")
        return latents

    def _wide(self, w: Any) -> torch.Tensor:
        """w with all layers of W+, `(B, num_ws, w_dim)`."""
        layers, width = self.generator.num_ws, self.generator.config.w_dim
        if isinstance(w, torch.Tensor) and w.shape[-1:] == (width,):
            if w.ndim in (1, 2):
                return w.reshape(-1, 1, width).repeat(1, layers, 1)
            if w.ndim == 3 and w.shape[1] == layers:
                return w
        raise InputError(
            f"w must be a tensor ({width},), (images, {width}) or (images, {layers}, {width}), not {_told(w)}."
        )

    def _one_hot(
        self, labels: int | Sequence[int] | None, images: int, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor | None:
        classes = self.generator.config.c_dim
        if not classes:
            if labels is not None:
                raise InputError("This generator has no classes; leave class_labels out.")
            return None
        chosen = [labels] * images if isinstance(labels, int) else list(labels or ())
        if len(chosen) != images or not all(isinstance(c, int) and 0 <= c < classes for c in chosen):
            raise InputError(
                f"class_labels={labels!r} does not fit; this generator needs a class from 0 to {classes - 1} "
                f"for all images, or one for each of the {images}."
            )
        return torch.nn.functional.one_hot(torch.tensor(chosen, device=device), classes).to(dtype)


def _told(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__
