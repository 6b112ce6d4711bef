"""What each kind of SAE minimises: one function a kind, chosen by the SAE's class.

All are divided by the variance of the rows, so that the part that tells how well rows are reconstructed is the FVU.
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple

import torch

from ..saes import (
    BatchTopKSAE,
    ChannelAwareSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    SparseAutoencoder,
    TopKSAE,
)
from ..saes.ops import at_once, largest_of_all, ragged_decode, sampled_linear, starts, topk_reconstruct
from ..saes.precision import at_least_fp32
from .losses import fraction_of_variance_unexplained as fvu_of

THRESHOLD_MEMORY = 0.99
"""Share of a BatchTopK threshold that a step leaves as it was."""


class Objective(NamedTuple):
    """`loss` to minimise, reconstruction `x_hat (N, d)`, its FVU, and which latents fired on any row, `(n,)`.

    `threshold` is what a BatchTopK threshold becomes after the step.
    """

    loss: torch.Tensor
    x_hat: torch.Tensor
    fvu: torch.Tensor
    fired: torch.Tensor
    threshold: torch.Tensor | None = None


@singledispatch
def objective(
    sae: SparseAutoencoder,
    x: torch.Tensor,
    weights: torch.Tensor | None,
    sparsity: float,
    bandwidth: float,
    search_dtype: torch.dtype = torch.float32,
) -> Objective:
    """The objective of rows `x (N, d)`, of mean square norm d, each with its weight `(N,)` in the FVU.

    `sparsity` is the weight of an L1 or L0 penalty; `bandwidth` the width of JumpReLU's pseudo-derivative;
    `search_dtype` the dtype in which TopK searches for the largest latents.
    """
    raise TypeError(f"{type(sae).__name__} has no training objective; register one with objective.register.")


def trainable(cls: type[SparseAutoencoder]) -> bool:
    """Whether a kind of SAE has an objective."""
    return objective.dispatch(cls) is not objective.dispatch(SparseAutoencoder)


def _fired(z: torch.Tensor) -> torch.Tensor:
    return (z.detach() != 0).any(0)


def _fired_of(values: torch.Tensor, indices: torch.Tensor, n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.bool, device=values.device).index_fill_(0, indices[values != 0], True)


@objective.register
def _topk(
    sae: TopKSAE,
    x: torch.Tensor,
    weights: torch.Tensor | None,
    sparsity: float,
    bandwidth: float,
    search_dtype: torch.dtype = torch.float32,
) -> Objective:
    W_enc, b_enc, W_dec = (at_least_fp32(p) for p in (sae.W_enc, sae.b_enc, sae.W_dec))
    values, indices, x_hat = topk_reconstruct(
        sae.normalized(x), W_enc, b_enc, W_dec, sae.b_dec, sae.k, search_dtype=search_dtype, relu=sae.relu
    )
    fvu = fvu_of(x, x_hat, weights)
    return Objective(fvu, x_hat, fvu, _fired_of(values, indices, sae.n_latents))


def _batch_topk_code(sae: BatchTopKSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k N largest codes of the batch (equation 5): values, indices and offsets, as in `saes.ops`."""
    values, indices, offsets = _largest_codes(sae, x)
    weight, bias = at_least_fp32(sae.W_enc), at_least_fp32(sae.b_enc)
    known = sampled_linear(at_least_fp32(x) - sae.b_dec, weight, bias, indices, offsets, values)
    return known.relu(), indices, offsets


@torch.no_grad()
def _largest_codes(sae: BatchTopKSAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, indices and offsets of the k N largest pre-activations, which are made for a few rows at a time."""
    count, found = sae.k * len(x), []
    for rows in x.split(at_once(sae.n_latents)):
        found.append(largest_of_all(sae.pre_activations(rows), min(count, len(rows) * sae.n_latents)))
    if len(found) == 1:
        return found[0]
    values, indices = torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])
    entries = torch.repeat_interleave(torch.cat([offsets.diff() for _, _, offsets in found]))  # each one's row
    chosen = values.topk(count, sorted=False).indices.sort().values
    return values[chosen], indices[chosen], starts(entries[chosen], len(x))


def _next_threshold(sae: BatchTopKSAE, values: torch.Tensor) -> torch.Tensor:
    """What the threshold becomes by the least code of the batch (equation 7)."""
    values, threshold = values.detach(), at_least_fp32(sae.threshold)
    least = torch.where(values > 0, values, torch.inf).min()
    least = torch.where(least.isinf(), threshold, least)  # nothing is active
    return torch.where(threshold == 0, least, torch.lerp(least, threshold, THRESHOLD_MEMORY))


@objective.register
def _batch_topk(sae: BatchTopKSAE, x: torch.Tensor, weights: torch.Tensor | None, *_: Any) -> Objective:
    values, indices, offsets = _batch_topk_code(sae, x)
    x_hat = ragged_decode(values, indices, offsets, at_least_fp32(sae.W_dec)) + sae.b_dec
    fvu = fvu_of(x, x_hat, weights)
    return Objective(fvu, x_hat, fvu, _fired_of(values, indices, sae.n_latents), _next_threshold(sae, values))


@objective.register
def _matryoshka(sae: MatryoshkaSAE, x: torch.Tensor, weights: torch.Tensor | None, *_: Any) -> Objective:
    """The mean FVU over prefixes of the latents (2503.17547, equation 4)."""
    values, indices, offsets = _batch_topk_code(sae, x)
    rows = torch.repeat_interleave(offsets.diff())
    x = at_least_fp32(x)
    x_hat, loss, start = sae.b_dec + torch.zeros_like(x), x.new_zeros(()), 0
    sizes = [stop - start for start, stop in zip((0, *sae.prefixes), sae.prefixes, strict=False)]
    for stop, directions in zip(sae.prefixes, at_least_fp32(sae.W_dec).split(sizes), strict=True):
        here = (indices >= start) & (indices < stop)
        x_hat = x_hat + ragged_decode(values[here], indices[here] - start, starts(rows[here], len(x)), directions)
        fvu = fvu_of(x, x_hat, weights)
        loss, start = loss + fvu / len(sae.prefixes), stop
    return Objective(loss, x_hat, fvu, _fired_of(values, indices, sae.n_latents), _next_threshold(sae, values))


@objective.register(ReLUSAE)
@objective.register(ChannelAwareSAE)
def _relu(sae: SparseAutoencoder, x: torch.Tensor, weights: torch.Tensor | None, sparsity: float, *_: Any) -> Objective:
    """FVU and an L1 penalty on the codes (2309.08600, equation 4; Ijishakin et al., 2024, equation 8)."""
    z = sae.encode(x)
    x_hat = sae.decode(z)
    fvu = fvu_of(x, x_hat, weights)
    return Objective(fvu + sparsity * _per_variance(z, x), x_hat, fvu, _fired(z))


def _per_variance(amounts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the sum of `amounts (N, n)`, divided by the variance of the rows."""
    x = at_least_fp32(x)
    return amounts.sum(-1).mean() / (x - x.mean(0)).square().sum(-1).mean()


@objective.register
def _gated(sae: GatedSAE, x: torch.Tensor, weights: torch.Tensor | None, sparsity: float, *_: Any) -> Objective:
    """FVU, L1 on the gates, and what they alone reconstruct through a decoder held fixed (2404.16014, equation 8)."""
    pre = sae.pre_activations(x)
    z, gates = sae.activate(pre), pre.relu()
    x_hat = sae.decode(z)
    fvu = fvu_of(x, x_hat, weights)
    by_gates = fvu_of(x, gates @ at_least_fp32(sae.W_dec.detach()) + sae.b_dec.detach(), weights)
    return Objective(fvu + sparsity * _per_variance(gates, x) + by_gates, x_hat, fvu, _fired(z))


@objective.register
def _jump_relu(
    sae: JumpReLUSAE, x: torch.Tensor, weights: torch.Tensor | None, sparsity: float, bandwidth: float, *_: Any
) -> Objective:
    """FVU and an L0 penalty (2407.14435, equation 9), with straight-through gradients for the thresholds."""
    pre, threshold = sae.pre_activations(x).relu(), at_least_fp32(sae.threshold)
    z = JumpReLU.apply(pre, threshold, bandwidth)
    x_hat = sae.decode(z)
    fvu = fvu_of(x, x_hat, weights)
    active = Step.apply(pre, threshold, bandwidth)
    return Objective(fvu + sparsity * _per_variance(active, x), x_hat, fvu, _fired(z))


def _near(pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """The kernel `K((π - θ) / ε) / ε` for K = 1 on [-1/2, 1/2] and 0 elsewhere."""
    return ((pre - threshold).abs() <= bandwidth / 2).to(pre.dtype) / bandwidth


class JumpReLU(torch.autograd.Function):
    """`π H(π - θ)` with the pseudo-derivative of 2407.14435, equation 11, for θ."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = _near(pre, threshold, ctx.bandwidth)
        return grad * (pre > threshold), -(threshold * near * grad).sum(0), None


class Step(torch.autograd.Function):
    """`H(π - θ)` with the pseudo-derivative of 2407.14435, equation 12, for θ, and none for π."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        return None, -(_near(pre, threshold, ctx.bandwidth) * grad).sum(0), None
