"""How far each latent moves the denoiser towards a concept: attribution by gradient, without labels or a judge.

A prompt with the concept and the same prompt without it are run as the two branches of guidance, so that both see the
same noise. The way from one prediction to the other is the concept's direction in the output. Gradient times
activation (attribution patching; Syed et al., 2310.10348) then says how much of it each latent carries.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from ..families import denoiser_of
from ..hooks import Observer, run_of
from ..layouts import LAYOUTS
from ..saes import SparseAutoencoder
from ..site_mapping import SiteMapping
from ..sites import Place, Site, input_of, resolve, tensor_of, update_of, with_input, with_tensor
from ..widths import check_update
from .trained_sites import by_trained_site

OWN_ARGUMENTS = ("prompt", "negative_prompt", "generator", "output_type")
"""Arguments of the pipeline that `concept_effect` sets."""


@torch.no_grad()
def concept_effect(
    pipe: Any,
    saes: Mapping[Site | str, SparseAutoencoder],
    prompts: Sequence[str],
    neutral: Sequence[str],
    *,
    seed: int = 0,
    **call: Any,
) -> tuple[SiteMapping[torch.Tensor], torch.Tensor]:
    """Effect of every latent at every timestep, `{site: (T, n)}`, averaged over images, and the timesteps `(T,)`.

    The unit is the share of the concept's push: 1 if a latent alone made the whole difference between the predictions.
    Where the predictions do not differ at all, effects are 0. The plan rests meanwhile: effects are those of the
    unsteered model.

    Args:
        saes: `{site: SAE}`; of a path alone, kind, stream and layout are those that the SAE was trained at, if it says
            so. All sites share the generation and the backward pass.
        prompts, neutral: prompts with the concept, and the same ones without it, in the same order.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...); guidance must be on.

    Raises:
        InputError: prompts that do not go together, a site outside the denoiser, an SAE of another width, a step
            without guidance, or a pipeline that takes no negative prompts.
    """
    _check_call(pipe, prompts, neutral, call)
    at = by_trained_site(saes)
    places = {site: _place_of(pipe, site) for site in at}
    modules = {site: place.module for site, place in places.items()}
    denoiser = next(iter(places.values())).root
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with _recorded_calls(pipe, places) as calls:
        pipe(prompt=list(prompts), negative_prompt=list(neutral), generator=generators, output_type="latent", **call)
    effects: dict[Site, list[torch.Tensor]] = {site: [] for site in at}
    timesteps = []
    for step in _guided_steps(calls):
        timesteps.append(step.timestep)
        for site, (rows, gradient) in _gradients(denoiser, modules, step).items():
            effects[site].append(_effect(at[site], rows, gradient, site))
    return SiteMapping((site, torch.stack(each)) for site, each in effects.items()), torch.tensor(timesteps)


def _check_call(pipe: Any, prompts: Sequence[str], neutral: Sequence[str], call: Mapping[str, Any]) -> None:
    taken = inspect.signature(type(pipe).__call__).parameters
    if not {"prompt", "negative_prompt"} <= set(taken):
        raise InputError(f"{type(pipe).__name__} takes no prompts and negative prompts, which effects are measured by.")
    if isinstance(prompts, str) or isinstance(neutral, str) or not prompts or len(prompts) != len(neutral):
        raise InputError("Pass a list of prompts with the concept, and a list of as many prompts without it.")
    same = [prompt for prompt, other in zip(prompts, neutral, strict=True) if prompt == other]
    if same:
        raise InputError(f"{same[0]!r} is the prompt with and without the concept; leave the concept out of one.")
    for name in OWN_ARGUMENTS:
        if name in call:
            raise InputError(f"{name} is set by concept_effect itself; leave it out.")


def _place_of(pipe: Any, site: Site) -> Place:
    place = resolve(pipe, site)
    if place.root_name != denoiser_of(pipe)[0] or place.is_argument:
        raise InputError(f"{site} is no block of the denoiser, so that it has no effect at each step; choose one.")
    check_update(place, site)
    return place


class _Call(NamedTuple):
    """One call of the denoiser."""

    args: tuple
    kwargs: dict[str, Any]
    branches: tuple[str, ...]
    timestep: float

    def part(self, x: torch.Tensor, branch: str) -> slice:
        """The rows of one branch in a batch `x` of this call."""
        images, i = len(x) // len(self.branches), self.branches.index(branch)
        return slice(i * images, (i + 1) * images)


class _GuidedStep(NamedTuple):
    """The calls in which the predictions with the concept and without it were made; the same one, or two."""

    concept: _Call
    neutral: _Call

    @property
    def timestep(self) -> float:
        return self.concept.timestep


@contextmanager
def _recorded_calls(pipe: Any, places: Mapping[Site, Place]) -> Iterator[list[_Call]]:
    """All calls of the denoiser inside the `with` block, in which the plan rests."""
    calls: list[_Call] = []
    # observers that take nothing, so that the run keeps the context of the denoiser: of outputs, since there may be no
    # update
    observers = [Observer(replace(site, kind="output"), place, lambda *_: None) for site, place in places.items()]
    root = observers[0].place.root

    def record(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        run = run_of(pipe)
        if run is not None:
            context = run.context_of(root)
            calls.append(_Call(args, kwargs, context.branches, context.timestep))

    with pipe._steering.unsteered(), pipe._steering.observed(observers):
        handle = root.register_forward_pre_hook(record, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()


def _guided_steps(calls: Iterable[_Call]) -> Iterator[_GuidedStep]:
    """Calls in pairs of both branches; raises `InputError` where one is missing."""
    waiting: dict[str, _Call] = {}
    for call in calls:
        if call.kwargs.get("skip_layers") is not None:  # the extra call of skip-layer guidance
            continue
        if any(branch in waiting for branch in call.branches):
            break
        waiting |= dict.fromkeys(call.branches, call)
        if {"cond", "uncond"} <= set(waiting):
            yield _GuidedStep(waiting["cond"], waiting["uncond"])
            waiting = {}
    if waiting:
        raise InputError(
            f"Guidance is off at timestep {next(iter(waiting.values())).timestep:g}, so that nothing is predicted "
            "without the concept; pass a guidance_scale (or true_cfg_scale) above 1, and a guided scheduler."
        )


@dataclass
class _Tracked:
    """What a site holds, `x`, and the change of it that gradients are taken by."""

    x: torch.Tensor
    shift: torch.Tensor


def _gradients(
    denoiser: nn.Module, modules: Mapping[Site, nn.Module], step: _GuidedStep
) -> dict[Site, tuple[torch.Tensor, torch.Tensor]]:
    """What each site holds for the prompts with the concept, and the gradient there, as rows `(images, P, d)` in fp32.

    Differentiated is the projection of the prediction onto (concept - neutral), as a share of its length.
    """
    with torch.enable_grad(), _tracking(modules) as tracked:
        output = _prediction(denoiser, step.concept)
    without = output.detach() if step.concept is step.neutral else _prediction(denoiser, step.neutral)
    missing = [str(site) for site in modules if site not in tracked]
    if missing:
        raise InputError(f"{missing[0]} did not run; choose another block.")
    cond = step.concept.part(output, "cond")
    towards = output.detach()[cond].float() - without[step.neutral.part(without, "uncond")].float()
    largest = towards.abs().flatten(1).amax(1)  # (images,)
    square = towards.square().flatten(1).sum(1)
    unit = torch.where(largest > 0, largest, 1.0).view(-1, *[1] * (towards.ndim - 1))
    # of about 1, since a share's gradient of 1 / square would vanish in half precision
    weights = torch.zeros_like(output)
    weights[cond] = (towards / unit).to(output.dtype)
    shifts = [each.shift for each in tracked.values()]
    gradients = torch.autograd.grad(output, shifts, weights, materialize_grads=True)
    share = torch.where(square > 0, largest / square, 0.0)[:, None, None]
    found = {}
    for (site, each), gradient in zip(tracked.items(), gradients, strict=True):
        to_rows, part = LAYOUTS[site.layout].to_rows, step.concept.part(each.x, "cond")
        found[site] = to_rows(each.x[part]).float(), to_rows(gradient[part]).float() * share
    return found


def _prediction(denoiser: nn.Module, call: _Call) -> torch.Tensor:
    output = denoiser(*call.args, **call.kwargs)
    prediction = output[0] if isinstance(output, tuple) else output.sample
    if not isinstance(prediction, torch.Tensor):
        raise InputError(f"{type(denoiser).__name__} predicts a list of tensors, for which no effect can be measured.")
    return prediction


def _effect(sae: SparseAutoencoder, x: torch.Tensor, gradient: torch.Tensor, site: Site) -> torch.Tensor:
    """Activation times gradient along the decoder row, added up over places: `(n,)`, mean over images.

    `x` and `gradient` are rows `(images, P, d)`.
    """
    if x.shape[-1] != sae.d_in:
        raise InputError(f"The SAE takes activations of width {sae.d_in} and {site} has {x.shape[-1]}; load another.")
    sae.fetch()
    x, gradient = x.to(sae.W_dec.device), gradient.to(sae.W_dec.device)
    code, scale = sae.encode_sparse(x), sae.row_scale(x)  # (images, P, k), (images, P, 1)
    gradient = gradient if scale is None else gradient * scale
    along = (gradient @ sae.W_dec.float().T).gather(-1, code.indices)
    effect = along.new_zeros(sae.n_latents)
    effect.index_add_(0, code.indices.flatten(), (code.values.float() * along).flatten())
    return (effect / len(x)).cpu()


@contextmanager
def _tracking(modules: Mapping[Site, nn.Module]) -> Iterator[dict[Site, _Tracked]]:
    """Collect what the sites hold, each with a shift of 0 to differentiate by; the graph begins at the first."""
    tracked: dict[Site, _Tracked] = {}

    def shifted(site: Site, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x = x if tracked else x.detach()
        tracked[site] = _Tracked(seen.detach(), torch.zeros_like(x, requires_grad=True))
        return x + tracked[site].shift

    def before(site: Site, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x = input_of(args, kwargs, site.stream)
        return with_input(args, kwargs, site.stream, shifted(site, x, x))

    def after(site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = tensor_of(output, module, site.stream)
        seen = update_of(x, input_of(args, kwargs, site.stream), site) if site.kind == "update" else x
        return with_tensor(output, shifted(site, x, seen), module, site.stream)

    with ExitStack() as stack:
        for site, module in modules.items():
            if site.kind == "input":
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, site=site: before(site, args, kwargs), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(
                    lambda m, args, kwargs, output, site=site: after(site, m, args, kwargs, output),
                    with_kwargs=True,
                )
            stack.callback(handle.remove)
        yield tracked
