"""Daujotas' SAEs of CLIP image embeddings (gytdau/clip-sae-128): ReLU, and the decoder's bias is not subtracted."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build, without_shift
from .base import Format


def _recognizes(weights: Weights) -> bool:
    return weights.only("encoder.weight", "enc_bias", "decoder.weight", "dec_bias")


def _read(weights: Weights) -> SparseAutoencoder:
    b_enc, b_dec = weights.vector("enc_bias"), weights.vector("dec_bias")
    n, d = len(b_enc), len(b_dec)
    W_enc, W_dec = weights.matrix("encoder.weight", n, d), weights.matrix("decoder.weight", n, d, True)
    tensors = {"W_enc": W_enc, "b_enc": without_shift(W_enc, b_enc, b_dec), "W_dec": W_dec, "b_dec": b_dec}
    return build("ReLUSAE", {}, tensors, weights.origin)


FORMAT = Format("clip_kandinsky", "Daujotas (clip-sae-128)", "`ReLU(W_enc x + enc_bias)`", _recognizes, _read)
