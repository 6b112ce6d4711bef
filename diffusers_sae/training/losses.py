"""Losses of sparse autoencoders, as functions of tensors."""

from __future__ import annotations

import torch

from ..saes import SparseAutoencoder
from ..saes.ops import at_once, largest, sparse_decode
from ..saes.precision import NO_SPREAD, at_least_fp32


def fraction_of_variance_unexplained(
    x: torch.Tensor, x_hat: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """FVU: `Σ‖x - x̂‖² / Σ‖x - x̄‖²` over the rows `(N, d)` of a batch, each times its weight `(N,)`, in fp32.

    NaN for rows that are all the same, which have no variance.
    """
    x, x_hat = at_least_fp32(x), at_least_fp32(x_hat)
    mean = x.mean(0)
    error, spread = (x - x_hat).square().sum(-1), (x - mean).square().sum(-1)
    whole = spread.sum()
    if weights is not None:
        error, spread = error * weights, spread * weights
    fvu = error.sum() / spread.sum()
    return torch.where(whole > NO_SPREAD * len(x) * mean.square().sum(), fvu, torch.nan)


def has_spread(x: torch.Tensor) -> bool:
    """Whether rows `(N, d)` differ by more than rounding."""
    x = x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)  # since squares of the largest numbers overflow
    mean = x.mean(0)
    return bool((x - mean).square().sum() > NO_SPREAD * len(x) * mean.square().sum())


def aux_k_loss(
    sae: SparseAutoencoder, x: torch.Tensor, x_hat: torch.Tensor, dead: torch.Tensor, k_aux: int
) -> torch.Tensor:
    """AuxK (Gao et al., 2024, appendix A.2): dead latents model the error that the live ones leave.

    The residual `x - x̂` is a constant here, and its model has no decoder bias, since x̂ has had it already. Scaled
    like the FVU of that residual. `dead (n,)` marks latents that have not fired for long. Unlike in the paper,
    gradients pass the ReLU straight through, since a latent whose pre-activation is negative on every row would have
    none and stay dead; and no row takes more than a quarter of the dead, so that few of them are told apart too.
    """
    x, x_hat = at_least_fp32(x), at_least_fp32(x_hat)
    k = min(k_aux, -(-int(dead.sum()) // 4))
    if k == 0:
        return x.new_zeros(())
    residual = (x - x_hat).detach()
    indices = _largest_of(sae, x, dead.nonzero().flatten(), k)
    values = sae.pre_activations_at(x, indices)
    values = values + (values.relu() - values).detach()
    model = sparse_decode(values, indices, at_least_fp32(sae.W_dec), x.new_zeros(x.shape[1]))
    return (residual - model).square().sum() / residual.square().sum().clamp(min=1e-12)


@torch.no_grad()
def _largest_of(sae: SparseAutoencoder, x: torch.Tensor, latents: torch.Tensor, k: int) -> torch.Tensor:
    """Which of `latents` have each row's k largest pre-activations, `(N, k)`; neither those nor copies of the encoder's
    rows ever exceed `ops.HELD` numbers."""
    values, indices = x.new_empty(len(x), 0), latents.new_empty(len(x), 0)
    for some in latents.split(at_once(max(x.shape))):
        found, chosen = largest(sae.pre_activations(x, some), min(k, len(some)))
        values, indices = torch.cat([values, found], 1), torch.cat([indices, some[chosen]], 1)
        values, best = values.topk(min(k, values.shape[1]), dim=-1, sorted=False)
        indices = indices.gather(1, best)
    return indices
