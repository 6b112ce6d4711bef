"""How far each latent moves the denoiser towards a concept: attribution by gradient, without labels or a judge.

A prompt with the concept and the same prompt without it are run as the two branches of guidance, so that both see the
same noise. The way from one prediction to the other is the concept's direction in the output. Gradient times
activation (attribution patching; Syed et al., 2310.10348) then says how much of it each latent carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..saes import SparseAutoencoder
from ..sites import LAYOUTS, Site, resolve, tensor_of, with_tensor


def concept_effect(
    pipe: Any,
    sae: SparseAutoencoder,
    site: Site,
    prompts: Sequence[str],
    neutral: Sequence[str],
    *,
    seed: int = 0,
    **call: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Effect of every latent at every timestep, `(T, n)`, averaged over images, and the timesteps `(T,)`.

    Args:
        prompts, neutral: prompts with the concept, and the same ones without it, in the same order.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...); guidance must be on.

    The unit is the share of the concept's push: 1 if a latent alone made the whole difference between the predictions.
    """
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with _recorded_calls(pipe.unet) as calls:
        pipe(list(prompts), negative_prompt=list(neutral), generator=generators, output_type="latent", **call)
    effects = [_effect_of_call(pipe.unet, resolve(pipe, site), sae, site, args, kwargs) for args, kwargs in calls]
    timesteps = torch.tensor([float(args[1] if len(args) > 1 else kwargs["timestep"]) for args, kwargs in calls])
    return torch.stack(effects), timesteps


def _effect_of_call(
    denoiser: nn.Module, module: nn.Module, sae: SparseAutoencoder, site: Site, args: tuple, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Effect `(n,)` in one call of the denoiser on a batch `[neutral, concept]`."""
    with torch.enable_grad(), _leaf_at(module) as leaves:
        output = denoiser(*args, **kwargs)
        prediction = output[0] if isinstance(output, tuple) else output.sample
        without, with_concept = prediction.chunk(2)
        towards = (with_concept - without).detach()
        square = towards.square().flatten(1).sum(1).clamp(min=1e-12)  # (images,)
        share = (with_concept * towards).flatten(1).sum(1) / square
        (gradient,) = torch.autograd.grad(share.sum(), leaves[0])
    to_rows = LAYOUTS[site.layout].to_rows
    x, g = (to_rows(t.chunk(2)[1]).float() for t in (leaves[0].detach(), gradient))  # (images, P, d)
    code = sae.encode_sparse(x)  # (images, P, k)
    along = (g @ sae.W_dec.T).gather(-1, code.indices)
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
def _leaf_at(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Make the module's output a leaf that gradients stop at; yields the list that it is put into."""
    leaves: list[torch.Tensor] = []

    def cut(_: nn.Module, __: tuple, output: Any) -> Any:
        leaves.append(tensor_of(output).detach().requires_grad_())
        return with_tensor(output, leaves[-1])

    handle = module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()
