"""OpenAI's sparse_autoencoder (Gao et al., 2406.04093): TopK SAEs take rows of mean 0 and deviation 1."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format, Signature

NAMES = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
TIED = ("encoder.weight", "latent_bias", "decoder.linear.weight", "pre_bias")
"""A decoder that is tied holds the encoder's layer, and so its matrix as it lies there."""
BUFFERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def _convert(weights: Weights) -> SparseAutoencoder:
    is_tied = weights.has("decoder.linear.weight")
    tensors = weights.parts(*TIED) if is_tied else weights.parts(*NAMES, turned="W_dec")
    if weights.choice("activation", ("TopK", "ReLU"), "none") == "ReLU":
        return build("ReLUSAE", {}, tensors, weights.origin)
    told = weights.section("activation_state_dict")
    after = told.choice("postact_fn", ("ReLU", "Identity"), "ReLU")
    arguments = {"k": _k(weights, told), "relu": after == "ReLU", "input_norm": "layer_norm"}
    return build("TopKSAE", arguments, tensors, weights.origin)


def _k(weights: Weights, told: Weights) -> int:
    """It stands in the state of the activation and again, as `activation.k`, among the tensors."""
    if weights.has("activation.k"):
        return weights.whole_tensor("activation.k")
    return told.whole("k") if "k" in told.config else weights.whole("k", "activation.k")


FORMAT = Format(
    "openai",
    "OpenAI sparse_autoencoder",
    "k largest of `W_enc (LN(x) - pre_bias) + latent_bias`, ReLU; or ReLU alone, without LN",
    (
        Signature(NAMES, optional=("activation.k",), buffers=BUFFERS),
        Signature(TIED, optional=("activation.k",), buffers=BUFFERS),
    ),
    _convert,
    marks=("activation",),
)
