"""Activations straight from a generating pipeline, several sites in one pass, and a buffer that shuffles their rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..activations import AllSeen, SiteActivations
from ..errors import InputError
from ..families import denoiser_of, family_of
from ..site_mapping import SiteMapping, distinct_sites
from ..sites import Site
from .calls import CAPTURE_SETS, arguments_refused_by, check_call

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Shares of noise that images get."""


@dataclass
class StreamBatch:
    """One generation: its prompts and, for every site, what it held at every timestep.

    `first_image` counts the images that came before this batch.
    """

    prompts: list[str]
    first_image: int
    sites: SiteMapping[SiteActivations]

    def rows(self, site: Site | str, branch: str = "cond") -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `(T, images, P, d)` in fp32 of one branch, and the timesteps `(T,)`."""
        held = self.sites[site]
        keep = [b == branch for b in held.branch]
        if not any(keep):
            raise InputError(
                f"{held.site} held no rows of the branch {branch!r}; it held {', '.join(sorted(set(held.branch)))}."
            )
        rows = held.rows(branch=branch).float()
        timesteps = held.timestep[torch.tensor(keep)]
        n = len(self.prompts)
        return rows.view(-1, n, *rows.shape[1:]), timesteps[::n]


def stream_activations(
    pipe: Any,
    sites: Sequence[Site | str],
    prompts: Iterable[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
    skip: int = 0,
    first_step_only: bool = False,
    images: Sequence[Any] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    **call: Any,
) -> Iterator[StreamBatch]:
    """Generate latents for `prompts` and yield what the sites held, a batch of prompts at a time.

    The plan rests meanwhile, so that training and statistics see the model and not its edits; `pipe.capture` shows
    what a steered run holds.

    Image `i` starts from the noise of seed `seed + i`, whatever the batch size, so that a run can be resumed:
    `skip` leaves out the first images. With `first_step_only`, the rest of the denoising is left out. `call` goes to
    the pipeline (`num_inference_steps`, `guidance_scale`, ...).

    With `images`, one for each prompt, nothing is generated: an img2img pipeline adds noise to each, once for each of
    the `strengths` (shares of the schedule, up to 1 for noise alone), and its denoiser is called once.

    Where the denoiser is called once, it runs no further than to the last of the sites: for h-space
    (`unet.mid_block`), without the up blocks.
    """
    places = distinct_sites(sites)
    once = first_step_only or images is not None
    taken = ("callback_on_step_end",) * once + ("image", "strength") * (images is not None)
    check_call(pipe, call, (*CAPTURE_SETS, *taken))
    if once:
        call["callback_on_step_end"] = _stop
    if images is not None:
        check_images(pipe, strengths, call)
    stream = islice(iter(prompts), skip, None)
    first = skip
    while batch := list(islice(stream, batch_size)):
        n = len(batch)
        with pipe.capture(places) as activations:
            activations.once = once and _one_call_sees_all(pipe, places)
            owns: list[dict[str, Any]] = [{}]
            if images is not None:
                noised = _images_from(images, first, n)
                owns = [{"image": noised, "strength": strength} for strength in strengths]
            for own in owns:
                generators = [torch.Generator().manual_seed(seed + first + i) for i in range(n)]
                try:
                    with pipe._steering.unsteered(), arguments_refused_by(pipe):
                        pipe(batch, generator=generators, output_type="latent", **own, **call)
                except AllSeen:
                    pipe.maybe_free_model_hooks()  # the last thing that a pipeline does
        if images is not None:
            for held in activations.values():
                held.count_images_anew(n)
        yield StreamBatch(batch, first, activations)
        first += n


def _one_call_sees_all(pipe: Any, sites: Sequence[Site]) -> bool:
    """Whether all sites lie in the denoiser, which is called for all branches at once, and may be left by an exception:
    a compiled one may not."""
    name, denoiser = denoiser_of(pipe)
    inside = all(site.path.startswith(f"{name}.") for site in sites)
    compiled = any(module._compiled_call_impl is not None for module in denoiser.modules())
    return inside and not compiled and not hasattr(denoiser, "_orig_mod") and not family_of(pipe).in_turn


def check_images(pipe: Any, strengths: Sequence[float], call: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the pipeline takes images, and noise of these strengths."""
    if not {"image", "strength"} <= set(inspect.signature(type(pipe).__call__).parameters):
        raise InputError(
            f"{type(pipe).__name__} takes no images to add noise to; make its img2img sibling with "
            "SAESteeringPipeline.from_pipe(AutoPipelineForImage2Image.from_pipe(pipe))."
        )
    steps = call.get("num_inference_steps", 50)
    for strength in strengths:
        if not 1 / steps <= strength <= 1:
            raise InputError(f"Strength {strength} must lie between one step of {steps} ({1 / steps:.3g}) and 1.")


def _images_from(images: Sequence[Any], first: int, n: int) -> list[Any]:
    found = list(images[first : first + n])
    if len(found) < n:
        raise InputError(f"There are {len(images)} images for more prompts; give one for each.")
    return found


def _stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = True
    return tensors


class ShuffleBuffer:
    """The last `capacity` rows of a stream, more or less, to draw mixed batches from.

    When it is full, new rows take the places of random old ones.
    """

    def __init__(self, capacity: int, d: int, generator: torch.Generator | None = None) -> None:
        self._rows = torch.empty(capacity, d)
        self._count = 0
        self._generator = generator

    def add(self, rows: torch.Tensor) -> None:
        """Add rows `(..., d)`; of more than `capacity`, a random choice, each row as likely as any other."""
        capacity = len(self._rows)
        rows = rows.reshape(-1, rows.shape[-1])
        if len(rows) > capacity:
            rows = rows[torch.randperm(len(rows), generator=self._generator)[:capacity]]
        rows = rows.to(self._rows)
        free = min(len(rows), capacity - self._count)
        self._rows[self._count : self._count + free] = rows[:free]
        self._count += free
        if free < len(rows):
            places = torch.randperm(capacity, generator=self._generator)[: len(rows) - free]
            self._rows[places] = rows[free:]

    def sample(self, n: int) -> torch.Tensor:
        """`n` random rows, `(n, d)`; they stay in the buffer."""
        return self._rows[torch.randint(self._count, (n,), generator=self._generator)]

    @property
    def rows(self) -> torch.Tensor:
        """All rows in the buffer, `(count, d)`."""
        return self._rows[: self._count]
