"""saev: a line of JSON, then a state dict; `b_dec` is not subtracted, and TopK has no ReLU.

Its first release (0.1.0 on PyPI) wrote no schema: ReLU SAEs, which do subtract `b_dec`.
"""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build, without_shift
from .base import TRANSFORMER_LENS, Format, Signature

FIRST = "ghost_grads"
"""A field that headers of the first release have, and later ones don't."""


def _convert(weights: Weights) -> SparseAutoencoder:
    tensors = weights.parts(*TRANSFORMER_LENS, turned="W_enc")
    n, d = tensors["W_dec"].shape
    if "schema" not in weights.config and FIRST in weights.config:
        weights.check_told(d_vit=d)
        return build("ReLUSAE", {}, tensors, weights.origin)
    told = weights.section("cfg")
    told.check_told(d_model=d, d_vit=d, d_sae=n)
    activation = told.section("activation")
    if "cls" not in activation.config:
        raise weights.refuse(
            f"is of schema {weights.config.get('schema')!r}, which does not tell its activation; known is 5"
        )
    parameters = activation.section("params")
    tensors["b_enc"] = without_shift(tensors["W_enc"], tensors["b_enc"], tensors["b_dec"])
    match activation.choice("cls", ("Relu", "TopK", "BatchTopK"), "", "activation"):
        case "Relu":
            return build("ReLUSAE", {}, tensors, weights.origin)
        case "TopK":
            k = min(parameters.whole("top_k", "k"), n)
            return build("TopKSAE", {"k": k, "relu": False}, tensors, weights.origin)
        case "BatchTopK":
            tensors["threshold"] = tensors["b_enc"].new_full((), max(0.0, weights.scalar("activation.threshold")))
            return build("BatchTopKSAE", {"k": min(parameters.whole("top_k", "k"), n)}, tensors, weights.origin)
    raise AssertionError("choice gave another word than it was asked for")


FORMAT = Format(
    "saev",
    "saev",
    "of `W_enc x + b_enc`: the k largest without ReLU, those above BatchTopK's threshold, or ReLU",
    (Signature(TRANSFORMER_LENS, optional=("activation.threshold",)),),
    _convert,
    marks=("schema", FIRST),
)
