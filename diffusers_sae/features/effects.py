"""How far each latent moves the denoiser towards a concept: attribution by gradient, without labels or a judge.

A prompt with the concept and the same prompt without it are run as the two branches of guidance, so that both see the
same noise. The way from one prediction to the other is the concept's direction in the output. Gradient times
activation (attribution patching; Syed et al., 2310.10348) then says how much of it each latent carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..saes import SparseAutoencoder
from ..sites import LAYOUTS, Site, resolve, tensor_of, with_tensor


def concept_effect(
    pipe: Any,
    saes: Mapping[str, SparseAutoencoder],
    prompts: Sequence[str],
    neutral: Sequence[str],
    *,
    seed: int = 0,
    **call: Any,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Effect of every latent at every timestep, `{site: (T, n)}`, averaged over images, and the timesteps `(T,)`.

    Args:
        saes: `{site: SAE}`; all sites share the generation and the backward pass.
        prompts, neutral: prompts with the concept, and the same ones without it, in the same order.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...); guidance must be on.

    The unit is the share of the concept's push: 1 if a latent alone made the whole difference between the predictions.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with _recorded_calls(pipe.unet) as calls:
        pipe(list(prompts), negative_prompt=list(neutral), generator=generators, output_type="latent", **call)
    sites = {path: Site(path) for path in saes}
    modules = {path: resolve(pipe, site).module for path, site in sites.items()}
    effects: dict[str, list[torch.Tensor]] = {path: [] for path in saes}
    for args, kwargs in calls:
        for path, (x, gradient) in _gradients(pipe.unet, modules, args, kwargs).items():
            to_rows = LAYOUTS[sites[path].layout].to_rows
            effects[path].append(_effect(saes[path], to_rows(x).float(), to_rows(gradient).float()))
    timesteps = torch.tensor([float(args[1] if len(args) > 1 else kwargs["timestep"]) for args, kwargs in calls])
    return {path: torch.stack(steps) for path, steps in effects.items()}, timesteps


def _gradients(
    denoiser: nn.Module, modules: Mapping[str, nn.Module], args: tuple, kwargs: dict[str, Any]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What each module gives for the concept's half of a batch `[neutral, concept]`, and the gradient there.

    Differentiated is the share of the way from the neutral prediction to the concept's.
    """
    with torch.enable_grad(), _tracked(modules) as tensors:
        output = denoiser(*args, **kwargs)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        without, with_concept = prediction.chunk(2)
        towards = (with_concept - without).detach()
        square = towards.square().flatten(1).sum(1).clamp(min=1e-12)  # (images,)
        share = (with_concept * towards).flatten(1).sum(1) / square
        gradients = torch.autograd.grad(share.sum(), list(tensors.values()))
    return {
        path: (x.detach().chunk(2)[1], gradient.chunk(2)[1])
        for (path, x), gradient in zip(tensors.items(), gradients, strict=True)
    }


def _effect(sae: SparseAutoencoder, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Activation times gradient along the decoder row, added up over places: `(n,)`, mean over images.

    `x` and `gradient` are rows `(images, P, d)`.
    """
    code = sae.encode_sparse(x)  # (images, P, k)
    along = (gradient @ sae.W_dec.T).gather(-1, code.indices)
    effect = torch.zeros(sae.n_latents).index_add_(0, code.indices.flatten(), (code.values * along).flatten())
    return effect / len(x)


@contextmanager
def _recorded_calls(denoiser: nn.Module) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Arguments of every call of the denoiser inside the `with` block."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    handle = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _tracked(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the modules' outputs as tensors to differentiate by; the graph begins at the first of them."""
    tensors: dict[str, torch.Tensor] = {}

    def track(path: str, output: Any) -> Any:
        x = tensor_of(output, modules[path])
        tensors[path] = x if tensors else x.detach().requires_grad_()
        return with_tensor(output, tensors[path], modules[path])

    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: track(path, output))
        for path, module in modules.items()
    ]
    try:
        yield tensors
    finally:
        for handle in handles:
            handle.remove()
