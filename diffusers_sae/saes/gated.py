"""Gated SAE (Rajamanoharan et al., 2024, 2404.16014, equations 6 and 7)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import ALL, register_architecture
from .elementwise import ElementwiseSAE
from .precision import at_least_fp32


@register_architecture
class GatedSAE(ElementwiseSAE):
    """`z = H(π) ReLU(e^r W_enc (x - b_dec) + b_mag)`, `π = W_enc (x - b_dec) + b_enc`: whether apart from how much.

    Besides the parameters of every SAE, of which `b_enc` is the gate's bias, it has `r_mag (n,)` and `b_mag (n,)`.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        input_norm: what is done to every row first, `layer_norm` or `constant_norm`; see `normalization`.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    code_settings = ("input_norm",)

    @register_to_config
    def __init__(
        self, d_in: int, n_latents: int, input_norm: str | None = None, provenance: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._make_parameters(d_in, n_latents, input_norm)
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        magnitude = at_least_fp32(self.r_mag[latents]).exp() * (pre - self.b_enc[latents]) + self.b_mag[latents]
        return nn.functional.relu(magnitude) * (pre > 0)

    @torch.no_grad()
    def scale_input_(self, factor: float) -> None:
        super().scale_input_(factor)
        self.b_mag.mul_(factor)
