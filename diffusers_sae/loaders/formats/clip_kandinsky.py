"""Daujotas' SAEs of CLIP image embeddings (gytdau/clip-sae-128): ReLU, and the decoder's bias is not subtracted."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build, without_shift
from .base import Format, Signature

NAMES = ("encoder.weight", "enc_bias", "decoder.weight", "dec_bias")


def _convert(weights: Weights) -> SparseAutoencoder:
    tensors = weights.parts(*NAMES, turned="W_dec")
    tensors["b_enc"] = without_shift(tensors["W_enc"], tensors["b_enc"], tensors["b_dec"])
    return build("ReLUSAE", {}, tensors, weights.origin)


FORMAT = Format(
    "clip_kandinsky", "Daujotas (clip-sae-128)", "`ReLU(W_enc x + enc_bias)`", (Signature(NAMES),), _convert
)
