"""Revelio: TopK without ReLU, so that the k largest pre-activations count even below 0; `b_dec` is subtracted.

Its files hold a pickled config and have to be converted; nothing in the tensors tells them from others'.
"""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format


def transposed_tensors(weights: Weights) -> dict:
    """`W_enc (d, n)`, `b_enc`, `W_dec (n, d)`, `b_dec`, as TransformerLens writes them, in our form."""
    b_enc, b_dec = weights.vector("b_enc"), weights.vector("b_dec")
    n, d = len(b_enc), len(b_dec)
    return {
        "W_enc": weights.matrix("W_enc", n, d, True),
        "b_enc": b_enc,
        "W_dec": weights.matrix("W_dec", n, d),
        "b_dec": b_dec,
    }


def _read(weights: Weights) -> SparseAutoencoder:
    return build("TopKSAE", {"k": weights.whole("k"), "relu": False}, transposed_tensors(weights), weights.origin)


FORMAT = Format(
    "revelio",
    "Revelio (named by `format`)",
    "k largest of `W_enc (x - b_dec) + b_enc`, without ReLU",
    lambda weights: False,
    _read,
)
