"""Losses of sparse autoencoders, as functions of tensors."""

from __future__ import annotations

import torch

from ..saes import SparseAutoencoder


def fraction_of_variance_unexplained(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """FVU: `Σ‖x - x̂‖² / Σ‖x - x̄‖²` over the rows `(N, d)` of a batch."""
    error, spread = squares(x, x_hat)
    return error.sum() / spread.sum()


def squares(x: torch.Tensor, x_hat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of the FVU of each row, `‖x - x̂‖²` and `‖x - x̄‖²`, both `(N,)`."""
    return (x - x_hat).square().sum(-1), (x - x.mean(0)).square().sum(-1)


class WorstGroup:
    """Weights of groups that grow where a group's loss is high, as group DRO does (Sagawa et al., 2019, algorithm 1).

    After every batch each weight is multiplied by `exp(rate · mean loss of the group)`, and all are scaled to a mean
    of 1.
    """

    def __init__(self, groups: int, rate: float) -> None:
        self.rate, self.weights = rate, torch.ones(groups)

    def update(self, loss: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """The rows' weights `(N,)` now, from the loss `(N,)` and the group `(N,)` of each."""
        counts = torch.bincount(groups, minlength=len(self.weights))
        sums = torch.bincount(groups, loss.detach(), minlength=len(self.weights)).float()
        self.weights *= (self.rate * sums / counts.clamp(min=1)).exp()
        self.weights /= self.weights.mean()
        return self.weights[groups]


def aux_k_loss(
    sae: SparseAutoencoder, x: torch.Tensor, x_hat: torch.Tensor, dead: torch.Tensor, k_aux: int
) -> torch.Tensor:
    """AuxK (Gao et al., 2024, appendix A.2): dead latents model the error that the live ones leave.

    The residual `x - x̂` is a constant here, and its model has no decoder bias, since x̂ has had it already. Scaled
    like the FVU of that residual. `dead (n,)` marks latents that have not fired for long. Unlike in the paper,
    gradients pass the ReLU straight through, since a latent whose pre-activation is negative on every row would have
    none and stay dead; and no row takes more than a quarter of the dead, so that few of them are told apart too.
    """
    residual = (x - x_hat).detach()
    k = min(k_aux, -(-int(dead.sum()) // 4))
    if k == 0:
        return x.new_zeros(())
    pre = sae.pre_activations(x).masked_fill(~dead, float("-inf"))
    values, indices = pre.topk(k, dim=-1, sorted=False)
    values = values + (values.relu() - values).detach()
    rows = torch.nn.functional.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum")
    return (residual - rows).square().sum() / residual.square().sum().clamp(min=1e-12)
