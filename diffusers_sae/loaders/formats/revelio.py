"""Revelio: TopK without ReLU, so that the k largest pre-activations count even below 0; `b_dec` is subtracted.

Its files hold a pickled config and have to be converted; nothing in the tensors tells them from others'.
"""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import TRANSFORMER_LENS, Format, Signature


def _convert(weights: Weights) -> SparseAutoencoder:
    return build(
        "TopKSAE",
        {"k": weights.whole("k"), "relu": False},
        weights.parts(*TRANSFORMER_LENS, turned="W_enc"),
        weights.origin,
    )


FORMAT = Format(
    "revelio",
    "Revelio (named by `format`)",
    "k largest of `W_enc (x - b_dec) + b_enc`, without ReLU",
    (Signature(TRANSFORMER_LENS),),
    _convert,
    must_be_named=True,
)
