"""OpenAI's sparse_autoencoder (Gao et al., 2406.04093): TopK SAEs take rows of mean 0 and deviation 1."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format


def _recognizes(weights: Weights) -> bool:
    return weights.only("encoder.weight", "decoder.weight", "pre_bias", "latent_bias") and (
        "activation" in weights.config
    )


def _read(weights: Weights) -> SparseAutoencoder:
    tensors = weights.parts("encoder.weight", "latent_bias", "decoder.weight", "pre_bias", turned="W_dec")
    activation, told = weights.config["activation"], weights.config.get("activation_state_dict") or {}
    if activation == "ReLU":
        return build("ReLUSAE", {}, tensors, weights.origin)
    if activation != "TopK":
        raise weights.refuse(f"has the activation {activation!r}; known are TopK and ReLU")
    after = told.get("postact_fn", "ReLU")
    if after not in ("ReLU", "Identity"):
        raise weights.refuse(f"has {after!r} after TopK; known are ReLU and Identity")
    k = Weights({}, {"k": told.get("k", weights.config.get("k"))}, weights.origin).whole("k")
    arguments = {"k": k, "relu": after == "ReLU", "input_norm": "layer_norm"}
    return build("TopKSAE", arguments, tensors, weights.origin)


FORMAT = Format(
    "openai",
    "OpenAI sparse_autoencoder",
    "k largest of `W_enc (LN(x) - pre_bias) + latent_bias`, ReLU; or ReLU alone, without LN",
    _recognizes,
    _read,
)
