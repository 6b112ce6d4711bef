"""BatchTopK SAE (Bussmann et al., 2024, 2412.06410, equations 4-7)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

from ..errors import InputError
from .base import ALL, register_architecture
from .elementwise import ElementwiseSAE


@register_architecture
class BatchTopKSAE(ElementwiseSAE):
    """`z = π H(π - θ)` with `π = ReLU(W_enc (x - b_dec) + b_enc)` and one θ for all latents.

    In training the k B largest of a batch of B rows are kept; θ, the buffer `threshold`, is the mean over batches of
    the smallest of them, so that a code depends on its own row alone.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        k: active latents of a row, on average.
        input_norm: what is done to every row first, `layer_norm` or `constant_norm`; see `normalization`.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    code_settings = ("input_norm",)  # k is for training, from which the threshold comes
    threshold: torch.Tensor

    @register_to_config
    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        input_norm: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._start(d_in, n_latents, k, input_norm)

    def _start(self, d_in: int, n_latents: int, k: int, input_norm: str | None) -> None:
        if not 0 < k <= n_latents:
            raise InputError(f"k is {k}, which must lie between 1 and n_latents ({n_latents}).")
        self.k = k
        self._make_parameters(d_in, n_latents, input_norm)
        self.register_buffer("threshold", torch.zeros(()))

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        return pre.relu() * (pre > self.threshold)

    @torch.no_grad()
    def scale_input_(self, factor: float) -> None:
        super().scale_input_(factor)
        self.threshold.mul_(factor)
