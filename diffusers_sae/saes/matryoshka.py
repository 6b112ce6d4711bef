"""Matryoshka SAE (Bussmann et al., 2025, 2503.17547, equations 3 and 4), with BatchTopK."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.configuration_utils import register_to_config

from ..errors import InputError
from .base import register_architecture
from .batch_topk import BatchTopKSAE


@register_architecture
class MatryoshkaSAE(BatchTopKSAE):
    """A BatchTopK SAE whose first m latents reconstruct the input by themselves, for each m of `prefixes`.

    Args:
        d_in: width of the activations.
        n_latents: number of latents.
        k: active latents of a row, on average.
        prefixes: rising sizes, of which the last is `n_latents`; by default sixteenth, eighth, quarter, half, all.
        input_norm: what is done to every row first, `layer_norm` or `constant_norm`; see `normalization`.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    @register_to_config
    def __init__(
        self,
        d_in: int,
        n_latents: int,
        k: int,
        prefixes: Sequence[int] | None = None,
        input_norm: str | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super(BatchTopKSAE, self).__init__()
        sizes = sorted({max(1, n_latents // 2**i) for i in range(5)}) if prefixes is None else list(prefixes)
        if sizes != sorted(set(sizes)) or not sizes or sizes[0] < 1 or sizes[-1] != n_latents:
            raise InputError(f"prefixes are {sizes}, which must rise from at least 1 to n_latents ({n_latents}).")
        self._start(d_in, n_latents, k, input_norm)
        self.prefixes = tuple(sizes)
