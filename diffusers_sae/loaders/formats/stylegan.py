"""Prasanna's tied SAEs of StyleGAN's W: one matrix, no biases, ReLU."""

from __future__ import annotations

import torch

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format, Signature


def _convert(weights: Weights) -> SparseAutoencoder:
    tensor = weights.floating("encoder.weight")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise weights.refuse(f"has an encoder.weight of shape {tuple(tensor.shape)}; it must be (latents, width)")
    n, d = tensor.shape
    W = weights.matrix("encoder.weight", n, d)
    tensors = {"W_dec": W, "b_enc": torch.zeros(n), "b_dec": torch.zeros(d)}
    return build("ReLUSAE", {"tied": True}, tensors, weights.origin)


FORMAT = Format(
    "stylegan",
    "Prasanna (StyleGAN)",
    "`ReLU(W x)`, tied",
    (Signature(("encoder.weight",)),),
    _convert,
    rows="encoder.weight",
)
