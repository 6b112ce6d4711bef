"""JumpReLU SAE (Rajamanoharan et al., 2024, 2407.14435, equations 3-5)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import ALL, register_architecture
from .elementwise import ElementwiseSAE


@register_architecture
class JumpReLUSAE(ElementwiseSAE):
    """`z = π H(π - θ)` with `π = W_enc (x - b_dec) + b_enc`: a latent is its pre-activation above its own threshold.

    Besides the parameters of every SAE it has `threshold (n,)`, θ, which training keeps at 0 or above.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        initial_threshold: θ of a new SAE, for rows of mean square norm d.
        input_norm: what is done to every row first, `layer_norm` or `constant_norm`; see `normalization`.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    code_settings = ("input_norm",)

    @register_to_config
    def __init__(
        self,
        d_in: int,
        n_latents: int,
        initial_threshold: float = 0.1,
        input_norm: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._make_parameters(d_in, n_latents, input_norm)
        self.threshold = nn.Parameter(torch.full((n_latents,), float(initial_threshold)))

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        return pre * (pre > self.threshold[latents])

    @torch.no_grad()
    def scale_input_(self, factor: float) -> None:
        super().scale_input_(factor)
        self.threshold.mul_(factor)
