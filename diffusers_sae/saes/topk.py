"""TopK SAE (Makhzani and Frey, 2013; Gao et al., 2024, "Scaling and evaluating sparse autoencoders", equations 1-2)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..errors import InputError
from .base import SparseAutoencoder, SparseCode, register_architecture
from .ops import topk_encode
from .precision import at_least_fp32

BLOCK = 4096
"""Latents whose pre-activations are looked at together, at least."""
TOGETHER = 2**24
"""Pre-activations that are looked at together, at most, unless `BLOCK` latents have more: 64 MiB of them."""


@register_architecture
class TopKSAE(SparseAutoencoder):
    """`z = TopK(ReLU(W_enc (x - b_dec) + b_enc))`, `x̂ = W_decᵀ z + b_dec`: each row keeps its k largest latents.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        k: active latents of a row.
        relu: whether latents below 0 are set to 0; without, the k largest may be negative.
        input_norm: what is done to every row first, `layer_norm` or `constant_norm`; see `normalization`.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    code_settings = ("input_norm", "k", "relu")

    @register_to_config
    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        relu: bool = True,
        input_norm: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < k <= n_latents:
            raise InputError(f"k is {k}, which must lie between 1 and n_latents ({n_latents}).")
        self.k, self.relu = k, relu
        self._make_parameters(d_in, n_latents, input_norm)

    def encode_sparse(self, x: torch.Tensor) -> SparseCode:
        rows = self.normalized(x).reshape(-1, self.d_in)
        weight, bias = at_least_fp32(self.W_enc), at_least_fp32(self.b_enc)
        values, indices = topk_encode(rows, weight, bias, self.b_dec, self.k, relu=self.relu)
        return SparseCode(values.view(*x.shape[:-1], self.k), indices.view(*x.shape[:-1], self.k))

    def encode_only(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The k-th largest pre-activation decides; it is found in blocks, and no dense code is kept.

        Latents that tie with the k-th are all active here, where `encode` keeps k of them.
        """
        centred = (self.normalized(x) - self.b_dec).reshape(-1, self.d_in)
        block = self._block_for(len(centred))
        if block >= self.n_latents:
            pre = nn.functional.linear(centred, at_least_fp32(self.W_enc), at_least_fp32(self.b_enc))
            # from this very product, since another one may round the k-th latent below itself
            z, largest = pre.index_select(-1, features), pre
        else:
            z, largest = self._pre_and_largest(centred, features, block)
        kth = largest.topk(self.k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        z = z.relu() if self.relu else z  # the k-th may stay below 0, since all latents above 0 are then active
        return (z * (z >= kth)).view(*x.shape[:-1], len(features))

    def _block_for(self, rows: int) -> int:
        """Latents that are looked at together: doubled while their pre-activations fit `TOGETHER`."""
        block = BLOCK
        while block < self.n_latents and 2 * block * rows <= TOGETHER:
            block *= 2
        return block

    def _pre_and_largest(
        self, centred: torch.Tensor, features: torch.Tensor, block: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pre-activations of `features (N, m)`, and some of all latents that hold the k largest of each row."""
        z = centred.new_zeros(len(centred), len(features))
        owner, place = features // block, features % block
        largest = []
        for i, start in enumerate(range(0, self.n_latents, block)):
            rows = slice(start, start + block)
            pre = nn.functional.linear(centred, at_least_fp32(self.W_enc[rows]), at_least_fp32(self.b_enc[rows]))
            width = pre.shape[-1]
            here = place if width == block else place.clamp(max=width - 1)
            z = torch.where(owner == i, pre.index_select(-1, here), z)
            largest.append(pre.topk(min(self.k, width), dim=-1, sorted=False).values)
        return z, torch.cat(largest, -1)
