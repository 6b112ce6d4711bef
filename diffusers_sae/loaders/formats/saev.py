"""saev: a line of JSON, then a state dict; `b_dec` is not subtracted, and TopK has no ReLU."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build, without_shift
from .base import TRANSFORMER_LENS, Format


def _recognizes(weights: Weights) -> bool:
    return "schema" in weights.config and isinstance(weights.config.get("cfg"), dict)


def _read(weights: Weights) -> SparseAutoencoder:
    told = weights.config["cfg"]
    activation = told.get("activation")
    if not isinstance(activation, dict) or "cls" not in activation:
        raise weights.refuse(
            f"is of schema {weights.config['schema']!r}, which does not tell its activation; known is 5"
        )
    parameters = Weights({}, activation.get("params") or {}, weights.origin)
    tensors = weights.parts(*TRANSFORMER_LENS, turned="W_enc")
    n, d = tensors["W_dec"].shape
    Weights({}, told, weights.origin).check_told(d_model=d, d_sae=n)
    tensors["b_enc"] = without_shift(tensors["W_enc"], tensors["b_enc"], tensors["b_dec"])
    match activation["cls"]:
        case "Relu":
            return build("ReLUSAE", {}, tensors, weights.origin)
        case "TopK":
            k = min(parameters.whole("top_k", "k"), n)
            return build("TopKSAE", {"k": k, "relu": False}, tensors, weights.origin)
        case "BatchTopK":
            tensors["threshold"] = tensors["b_enc"].new_full((), max(0.0, weights.scalar("activation.threshold")))
            return build("BatchTopKSAE", {"k": min(parameters.whole("top_k", "k"), n)}, tensors, weights.origin)
    raise weights.refuse(f"has the activation {activation['cls']!r}; known are Relu, TopK and BatchTopK")


FORMAT = Format(
    "saev",
    "saev",
    "of `W_enc x + b_enc`: the k largest without ReLU, those above BatchTopK's threshold, or ReLU",
    _recognizes,
    _read,
)
