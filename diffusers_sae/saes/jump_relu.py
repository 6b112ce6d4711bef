"""JumpReLU SAE (Rajamanoharan et al., 2024, 2407.14435, equations 3-5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import register_architecture
from .elementwise import ALL, ElementwiseSAE


@register_architecture
class JumpReLUSAE(ElementwiseSAE):
    """`z = π H(π - θ)` with `π = W_enc (x - b_dec) + b_enc`: a latent is its pre-activation above its own threshold.

    Besides the parameters of every SAE it has `log_threshold (n,)`, the logarithm of θ, so that θ stays above 0.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        threshold: θ of a new SAE, for rows of mean square norm d.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    @register_to_config
    def __init__(
        self, d_in: int, n_latents: int, threshold: float = 0.1, provenance: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._make_parameters(d_in, n_latents)
        self.log_threshold = nn.Parameter(torch.full((n_latents,), float(threshold)).log())

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        return pre * (pre > self.log_threshold[latents].exp())

    @torch.no_grad()
    def scale_input_(self, factor: float) -> None:
        super().scale_input_(factor)
        self.log_threshold.add_(math.log(factor))
