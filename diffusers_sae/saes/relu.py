"""ReLU SAE (Cunningham et al., 2023, 2309.08600, equations 1-3; Bricken et al., 2023)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import ALL, register_architecture
from .elementwise import ElementwiseSAE


@register_architecture
class ReLUSAE(ElementwiseSAE):
    """`z = ReLU(W_enc (x - b_dec) + b_enc)`, `x̂ = W_decᵀ z + b_dec`; trained with an L1 penalty on z.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        tied: whether encoder and decoder are one matrix, `W_enc = W_dec`.
        input_norm: what is done to every row first, `layer_norm` or `constant_norm`; see `normalization`.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    code_settings = ("input_norm",)

    @register_to_config
    def __init__(
        self,
        d_in: int,
        n_latents: int,
        tied: bool = False,
        input_norm: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._make_parameters(d_in, n_latents, input_norm)
        if tied:
            del self.W_enc

    def __getattr__(self, name: str) -> Any:
        parameters = self.__dict__.get("_parameters", {})
        if name == "W_enc" and "b_dec" in parameters and name not in parameters:  # it was made, and is tied
            return self.W_dec
        return super().__getattr__(name)

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        return nn.functional.relu(pre)
