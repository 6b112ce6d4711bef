"""RE-N-Y (cc3m-...): TopK of `ReLU(encoder(x - bias))`; `{features, pages, k}` in its config."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format, Signature

NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "bias")
"""dictionary_learning's ReLU SAEs have the same; their config has a `trainer`, and no `k`."""


def _convert(weights: Weights) -> SparseAutoencoder:
    tensors = weights.parts(*NAMES, turned="W_dec")
    n, d = tensors["W_enc"].shape
    weights.check_told(features=d, pages=n)
    return build("TopKSAE", {"k": weights.whole("k")}, tensors, weights.origin)


FORMAT = Format(
    "re_n_y",
    "RE-N-Y (cc3m)",
    "k largest of `ReLU(W_enc (x - bias) + b_enc)`",
    (Signature(NAMES),),
    _convert,
    bars=("trainer", "dict_class"),
)
