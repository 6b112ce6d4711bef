"""How each family of pipelines calls its denoiser: guidance branches, their order, and what it is given as timestep.

Facts read from the pipelines of diffusers 0.42; the first row of `FAMILIES` whose name is a part of the class name
counts. A pipeline without a row is taken to put `[uncond, cond]` in one batch if it has the property
`do_classifier_free_guidance`, and refused if not.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import nn

from .errors import InputError
from .handover import branches_handed_over, stock_class

DENOISERS = ("transformer", "unet")
GENERATORS = ("generator", "autoencoder")
"""Components that make the image in one pass, in pipelines that denoise nothing."""
PIPELINES = {
    "StyleGAN2Pipeline": "diffusers_sae.adapters.stylegan2_pipeline",
    "VectorVAEPipeline": "diffusers_sae.adapters.vector_vae_pipeline",
}
"""Modules of the pipeline classes that are this package's own and not diffusers'."""
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
Call = Mapping[str, Any]
"""The arguments of the running call of a pipeline, defaults filled in."""


class Family(NamedTuple):
    """How pipelines of one kind call their denoiser.

    `branches(pipe, call)` names them in order. They lie side by side in one batch, or, if `in_turn`, the denoiser is
    called once for each. `given(pipe, timesteps, dtype)` is the pipeline's own expression for what it gives its
    denoiser at timesteps of the scheduler, rounding included; it arrives in `dtype`. `cut_off` says that some steps
    may be without guidance although it is on.
    """

    branches: Callable[[Any, Call], tuple[str, ...]]
    in_turn: bool = False
    given: Callable[[Any, torch.Tensor, torch.dtype], torch.Tensor] = lambda pipe, timesteps, dtype: timesteps
    cut_off: bool = False


def _share(pipe: Any, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return timesteps.to(dtype) / 1000


def _share_cast_last(pipe: Any, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (timesteps / 1000).to(dtype)


def _share_from_noise(pipe: Any, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (1000 - timesteps) / 1000


def _scaled(pipe: Any, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return timesteps * pipe.transformer.config.timestep_scale


def _flow_of_angle(pipe: Any, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    each = timesteps[:, None]  # one by one: sines of many at once may be rounded otherwise
    return torch.cat([torch.sin(t) / (torch.cos(t) + torch.sin(t)) for t in each])


def _guided(pipe: Any, call: Call) -> tuple[str, ...]:
    return ("uncond", "cond") if pipe.do_classifier_free_guidance else ("cond",)


def _cond_first(pipe: Any, call: Call) -> tuple[str, ...]:
    return ("cond", "uncond") if pipe.do_classifier_free_guidance else ("cond",)


def _by_scale(pipe: Any, call: Call) -> tuple[str, ...]:
    return ("uncond", "cond") if (call.get("guidance_scale") or 0) > 1 else ("cond",)


def _true_guidance(pipe: Any, call: Call) -> tuple[str, ...]:
    negative = any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    return ("cond", "uncond") if negative and (call.get("true_cfg_scale") or 0) > 1 else ("cond",)


def _perturbed(unguided: Callable[[Any, Call], tuple[str, ...]]) -> Callable[[Any, Call], tuple[str, ...]]:
    def branches(pipe: Any, call: Call) -> tuple[str, ...]:
        return unguided(pipe, call) + (("perturbed",) if pipe.do_perturbed_attention_guidance else ())

    return branches


def _instruct(pipe: Any, call: Call) -> tuple[str, ...]:
    return ("cond", "image", "uncond") if pipe.do_classifier_free_guidance else ("cond",)


def _instruct_xl(pipe: Any, call: Call) -> tuple[str, ...]:
    guided = call["guidance_scale"] > 1 and call["image_guidance_scale"] >= 1
    return ("cond", "image", "uncond") if guided else ("cond",)


def _edits(pipe: Any, call: Call) -> tuple[str, ...]:
    return ("uncond", *["cond"] * (getattr(pipe, "enabled_editing_prompts", 0) or 0))


FAMILIES: dict[str, Family] = {
    "StableDiffusionXLInstructPix2Pix": Family(_instruct_xl),
    "InstructPix2Pix": Family(_instruct),
    "LEdits": Family(_edits),
    "PixArtSigmaPAG": Family(_perturbed(_by_scale)),
    "SanaPAG": Family(_perturbed(_guided)),
    "PAG": Family(_perturbed(_guided)),
    "PixArt": Family(_by_scale),
    "KandinskyV22Controlnet": Family(_by_scale),
    "KandinskyV22Combined": Family(_by_scale),
    "KandinskyV22Img2ImgCombined": Family(_by_scale),
    "KandinskyV22InpaintCombined": Family(_by_scale),
    "StableUnCLIP": Family(_by_scale),
    "AuraFlow": Family(_by_scale, given=_share_cast_last),
    "Flux2Klein": Family(_cond_first, in_turn=True, given=_share),
    "Flux": Family(_true_guidance, in_turn=True, given=_share),
    "QwenImage": Family(_true_guidance, in_turn=True, given=_share),
    "Chroma": Family(_cond_first, in_turn=True, given=_share),
    "ZImage": Family(_cond_first, given=_share_from_noise, cut_off=True),
    "SanaSprint": Family(lambda pipe, call: ("cond",), given=_flow_of_angle),
    "SanaControlNet": Family(_guided),
    "Sana": Family(_guided, given=_scaled),
    "CogView4": Family(_cond_first, in_turn=True),
}
"""The families that differ from the rule, by a part of the pipeline's class name."""

GENERAL = Family(_guided)


def family_of(pipe: Any) -> Family:
    """How this pipeline calls its denoiser."""
    name = stock_class(type(pipe)).__name__
    return next((family for part, family in FAMILIES.items() if part in name), GENERAL)


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of the pipeline's denoiser; raises `InputError` if it has none that can be steered."""
    return _first_of(DENOISERS, pipe)


def image_maker_of(pipe: Any) -> tuple[str, nn.Module]:
    """Name and module of what makes the pipeline's images: its denoiser, or a generator that needs one pass."""
    return _first_of(DENOISERS + GENERATORS, pipe)


def _first_of(names: tuple[str, ...], pipe: Any) -> tuple[str, nn.Module]:
    for name in names:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise InputError(
        f"{type(pipe).__name__} has neither a U-Net nor a transformer, so there is nothing to steer in it; load a "
        "text-to-image pipeline or one of its kind."
    )


def check_supported(pipe: Any) -> None:
    """Raise `InputError` for a pipeline whose branches or timesteps could only be guessed."""
    if branches_handed_over(type(pipe)) is not None and not hasattr(pipe, "unet"):
        return
    name, _ = image_maker_of(pipe)
    if name in GENERATORS:
        return
    if family_of(pipe) is GENERAL and not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise InputError(
            f"{type(pipe).__name__} does not say whether guidance is on, so that branches could not be told apart; "
            "use a pipeline with the property do_classifier_free_guidance, such as StableDiffusionPipeline."
        )


def images_of(call: Call) -> int | None:
    """Images that a call makes, prompts times images a prompt; `None` if its arguments do not tell."""
    for name in ("prompt", "prompt_embeds", "image_embeds"):
        value = call.get(name)
        if value is not None:
            count = 1 if isinstance(value, str) else len(value)
            return count * (call.get("num_images_per_prompt") or 1)
    return None


def pipeline_class(source: str | os.PathLike, kwargs: Mapping[str, Any]) -> Any:
    """The class that the pipeline's `model_index.json` names if it is one of this package's own, else diffusers'."""
    try:
        config = DiffusionPipeline.load_config(source, **{k: kwargs[k] for k in HUB_ARGUMENTS if k in kwargs})
    except (OSError, ValueError):
        return DiffusionPipeline  # which says what is wrong, or knows another way
    name = config.get("_class_name")
    return getattr(importlib.import_module(PIPELINES[name]), name) if name in PIPELINES else DiffusionPipeline
