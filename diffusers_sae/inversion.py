"""Inversion: the noise from which a deterministic pipeline makes a given image, to begin from with edits in force.

A pipeline with a deterministic scheduler is a chain of maps that can be undone one by one: DDIM (2010.02502, sections
4.3 and 5.4), and Euler's steps along a flow (2209.03003). H-space editing starts from a real image this way: it is
inverted to 0.7 T, edited there at one timestep, and denoised (Ijishakin et al., 2024).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from .autoencoding import encode_images
from .decisions import DecidedPlan, decide_plans, follows_steps, plan_replaced
from .errors import InputError
from .handover import stock_class
from .inverse_schedulers import InverseSteps, LastSteps, check_invertible
from .twins import stock_with_components, with_components
from .unit_range import as_unit_range

PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline)
DECIDED = (
    "latents", "num_inference_steps", "timesteps", "sigmas", "height", "width", "num_images_per_prompt",
    "prompt_embeds",
)  # fmt: skip
"""Arguments of a pipeline's call that an inversion decides."""


@dataclass(frozen=True, eq=False)
class Inversion:
    """Where a deterministic run passes that ends at a given image. Nothing was drawn to find it: it has no seed.

    Args:
        latents: `(N, C, h, w)`, at the noise level of `timesteps[0]`.
        timesteps: the scheduler's that are left to run from the latents on, falling.
        prompt: one for each image.
        to: share of the noise schedule that was asked for; `timesteps[0]` is at most `to * T`.
        guidance_scale: of the inversion; 1 is none.
        num_inference_steps: of a whole run, of which `timesteps` are the last.
        training_timesteps: T.
        size: height and width of the images.
    """

    latents: torch.Tensor
    timesteps: tuple[float, ...]
    prompt: tuple[str, ...]
    to: float
    guidance_scale: float
    num_inference_steps: int
    training_timesteps: int
    size: tuple[int, int]

    def window(self, at: float | None = None) -> dict[str, float]:
        """`start` and `stop` of one step of `run`: `pipe.steer({5: 8.0}, **inversion.window(at=0.6))`.

        Args:
            at: share of the noise schedule; the step nearest to timestep `at * T` is meant. By default the first step
                of `run`, which is h-space editing at `to`.

        Raises:
            InputError: `at` is outside (0, to].
        """
        if at is not None and not 0 < at <= self.to:
            raise InputError(f"at={at} is no share of noise that the run passes; pass a number in (0, {self.to:g}].")
        count, wanted = len(self.timesteps), self.timesteps[0] if at is None else at * self.training_timesteps
        i = min(range(count), key=lambda i: abs(self.timesteps[i] - wanted))
        return {"start": i / count, "stop": (i + 1) / count}

    def run(self, pipe: Any, **call: Any) -> Any:
        """Generate from the latents, with the pipeline's plan in force; without edits, the image that was inverted.

        Args:
            pipe: that the image was inverted with, or another of the same model and scheduler.
            call: further arguments of the pipeline's call, such as `output_type`, or another `prompt` or
                `guidance_scale` than the inversion's.

        Returns:
            What the pipeline returns.

        Raises:
            InputError: an argument that the inversion decides, or a pipeline or scheduler that it does not fit.
        """
        check_invertible_pipeline(pipe)
        taken = [name for name in DECIDED if name in call]
        if taken:
            raise InputError(f"{taken[0]} is decided by the inversion; leave it out, or invert the image anew.")
        prompt = _one_an_image(call.pop("prompt", self.prompt), len(self.latents))
        steps = LastSteps(pipe.scheduler, self.timesteps[0], self.timesteps)
        arguments = {"guidance_scale": self.guidance_scale, **call, "prompt": prompt, "latents": self.latents}
        _check_guidance_scale(arguments["guidance_scale"])
        return with_components(pipe, scheduler=steps)(
            height=self.size[0], width=self.size[1], num_inference_steps=self.num_inference_steps, **arguments
        )


def invert(
    pipe: Any,
    image: Any,
    prompt: str | Sequence[str],
    to: float = 0.7,
    *,
    num_inference_steps: int = 50,
    iterations: int = 1,
    decoder_iterations: int = 0,
    guidance_scale: float = 1.0,
    edited: bool = False,
    decisions: Mapping[tuple[str, int], Any] | None = None,
) -> Inversion:
    """Follow a deterministic pipeline backwards from an image towards the noise it would have come from.

    Edits rest meanwhile, also where a plan is in force, unless `edited`, and nothing is captured; the pipeline and its
    scheduler stay as they are, and no random number is drawn.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline with a `DDIMScheduler`, or a Stable Diffusion 3 pipeline with a
            `FlowMatchEulerDiscreteScheduler`; steerable or not.
        image: a PIL image, a tensor `(3, H, W)` or `(N, 3, H, W)`, or a list of images of one size. Floating-point
            numbers are in [0, 1]; uint8 and uint16 are divided by their type's maximum.
        prompt: what the image shows; one for all images, or one for each.
        to: how far towards noise: up to timestep `to * T`; 1 is pure noise. The steps that a run of
            `num_inference_steps` has at or below that timestep are undone.
        num_inference_steps: of a whole run from noise to image.
        iterations: calls of the model for each step. 1 is plain DDIM inversion; with 3, what `run` reconstructs
            is as near to the image as the autoencoder lets it be, at three times the cost.
        decoder_iterations: how often the latents are moved to what decodes to an image nearer to the one given (decoder
            inversion), which lets more than the autoencoder's own image come back; each costs a decoding and its
            gradient. With 0 they are the encoder's. Many lead to latents that the denoiser does not know: with more
            than about 3, take 3 `iterations` a step.
        guidance_scale: 1 is none, as in h-space editing; higher ones make the inversion less exact.
        edited: the pipeline's plan is in force meanwhile, for an image that was made with it: `run` then makes it again
            with the same plan, and without it what it would have been. `start`, `stop` and strengths that follow the
            steps count those of `run`; if a whole run made the image with such edits, pass `to=1`.
        decisions: what the rules of the plan decided when the image was made, which a run backwards cannot find out:
            `{(adapter_name, index of the edit): (N,) bool}`, needed if `edited` for every edit with a rule. It is what
            `pipe.rule_decisions()` gives after the run that made the image, and until the next run. The rules
            are of whole images, and watch an SAE at the site of their edit, or one of a text encoder.

    Raises:
        InputError: anything above is wrong. Nothing is changed.
    """
    check_invertible_pipeline(pipe)
    _check_numbers(pipe, to, num_inference_steps, iterations, decoder_iterations)
    _check_guidance_scale(guidance_scale)
    images = _as_images(image, _multiple(pipe))
    prompts = _one_an_image(prompt, len(images))
    plans = _plans(pipe, edited, decisions, len(images))
    training_timesteps = pipe.scheduler.config.num_train_timesteps
    steps = InverseSteps(pipe.scheduler, to * training_timesteps, iterations)
    size = images.shape[-2], images.shape[-1]
    call = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    encoded = encode_images(pipe, images, decoder_iterations)
    latents = torch.empty_like(encoded)
    twin = (with_components if edited else stock_with_components)(pipe, scheduler=steps)
    for plan in plans:
        some = [prompts[i] for i in plan.images]
        with plan_replaced(twin, plan.edits):
            latents[plan.images] = _follow_back(twin, encoded[plan.images], prompt=some, size=size, **call)
    if edited and len(steps.undone) < num_inference_steps and follows_steps(pipe):
        warnings.warn(
            f"The plan has edits that follow the steps, of which `run` has {len(steps.undone)}; if a run of all "
            f"{num_inference_steps} made the image, they acted at others, so pass to=1.",
            stacklevel=2,
        )
    return Inversion(
        latents, steps.undone, tuple(prompts), float(to), float(guidance_scale), num_inference_steps,
        training_timesteps, size,
    )  # fmt: skip


def _plans(pipe: Any, edited: bool, decisions: Any, count: int) -> list[DecidedPlan]:
    """What is in force for which of `count` images while they are inverted."""
    if edited:
        return decide_plans(pipe, decisions, count)
    if decisions is not None:
        raise InputError("decisions are those of a plan in force; leave them out, or pass edited=True.")
    return [DecidedPlan(list(range(count)), {})]


def _follow_back(twin: Any, latents: torch.Tensor, size: tuple[int, int], **call: Any) -> torch.Tensor:
    """The noise `(N, C, h, w)` that a pipeline with `InverseSteps` finds for the latents of images."""
    noise: torch.Tensor = twin(latents=latents, height=size[0], width=size[1], output_type="latent", **call).images
    first = twin.scheduler.first_sample
    if not torch.allclose(first, latents.to(first), rtol=0, atol=0, equal_nan=True):
        raise InputError(
            f"{type(twin).__name__} changes the latents that it is given before it denoises them, so that it cannot be "
            "inverted; pass a pipeline that begins as the stock class does."
        )
    return noise


def check_invertible_pipeline(pipe: Any) -> None:
    """Raise `InputError` for a pipeline that cannot be run backwards."""
    names = ", ".join(each.__name__ for each in PIPELINES)
    if not isinstance(pipe, PIPELINES):
        raise InputError(f"{type(pipe).__name__} cannot be inverted; pass one of {names}.")
    if next(each for each in stock_class(type(pipe)).__mro__ if "__call__" in vars(each)) not in PIPELINES:
        raise InputError(f"{type(pipe).__name__} denoises by a __call__ of its own; pass one of {names}.")
    check_invertible(pipe.scheduler)


def _check_numbers(pipe: Any, to: Any, num_inference_steps: Any, iterations: Any, decoder_iterations: Any) -> None:
    if not isinstance(to, (int, float)) or isinstance(to, bool) or not 0 < to <= 1:
        raise InputError(
            f"to={to!r} is no share of the noise schedule; pass a number in (0, 1], where 1 is pure noise."
        )
    most = pipe.scheduler.config.num_train_timesteps
    limits = {
        "num_inference_steps": (num_inference_steps, 1, most),
        "iterations": (iterations, 1, None),
        "decoder_iterations": (decoder_iterations, 0, None),
    }
    for name, (value, least, limit) in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (limit and value > limit):
            upper = f" to {limit}" if limit else " on"
            raise InputError(f"{name}={value!r} is no number of them; pass a whole number from {least}{upper}.")


def _check_guidance_scale(scale: Any) -> None:
    if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
        raise InputError(f"guidance_scale={scale!r:.80} is no finite number; pass one, such as 1.0 for no guidance.")


def _multiple(pipe: Any) -> int:
    """What height and width of an image must be divisible by."""
    return math.lcm(8, pipe.vae_scale_factor * getattr(pipe, "patch_size", 1))


def _as_images(image: Any, multiple: int) -> torch.Tensor:
    """`(N, 3, H, W)` in [0, 1] from what `invert` was given; raises `InputError`."""
    listed = list(image) if isinstance(image, (list, tuple)) else [image]
    tensors = [_as_tensor(each) for each in listed]
    sizes = {tuple(each.shape[-2:]) for each in tensors}
    if len(sizes) != 1:
        raise InputError(f"The images have {len(sizes)} different sizes; pass at least one, and all of one size.")
    height, width = sizes.pop()
    if height % multiple or width % multiple or not height * width:
        raise InputError(
            f"An image of {width} x {height} does not fit this pipeline; resize it to multiples of {multiple}."
        )
    return torch.cat(tensors)


def _as_tensor(image: Any) -> torch.Tensor:
    """`(N, 3, H, W)` of one PIL image or tensor."""
    if isinstance(image, Image.Image):
        pixels = as_unit_range(image, "The image")  # (H, W) or (H, W, 3)
        return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)[None].expand(1, 3, -1, -1)
    if not isinstance(image, torch.Tensor):
        raise InputError(f"An image of type {type(image).__name__} was passed; pass a PIL image, a tensor or a list.")
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        raise InputError(f"The image is a tensor {tuple(image.shape)}; pass (3, H, W) or (N, 3, H, W).")
    pixels = as_unit_range(image, "The image")
    return pixels if pixels.ndim == 4 else pixels[None]


def _one_an_image(prompt: Any, count: int) -> list[str]:
    prompts = [prompt] * count if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(each, str) for each in prompts):
        raise InputError(f"prompt={prompt!r} is no prompt; pass a string, or a list of one string for each image.")
    if len(prompts) != count:
        raise InputError(f"There are {len(prompts)} prompts for {count} images; pass one for all, or one for each.")
    return list(prompts)
