"""overcomplete (0.3): linear encoders without a pre-bias, a dictionary of unit rows times `exp(multiplier)`, no b_dec.

Only state dicts are read; a pickled module has to be converted. What is not in a state dict has to be told: `k` of
TopK, `threshold` of BatchTopK.
"""

from __future__ import annotations

import torch

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format, Signature

ENCODER = "encoder.final_block.0.weight"
DICTIONARY = "dictionary._weights"


def _convert(weights: Weights) -> SparseAutoencoder:
    b_enc = weights.vector("encoder.final_block.0.bias")
    n = len(b_enc)
    d = weights.floating(DICTIONARY).numel() // n if n else 0
    directions = weights.matrix(DICTIONARY, n, d)
    if weights.choice("normalization", ("l2", "identity"), "l2") == "l2":
        directions = directions / (directions.norm(dim=1, keepdim=True) + 1e-8)
    multiplier = weights.scalar("dictionary.multiplier") if weights.has("dictionary.multiplier") else 0.0
    tensors = {
        "W_enc": weights.matrix(ENCODER, n, d),
        "b_enc": b_enc,
        "W_dec": directions * torch.tensor(multiplier).exp(),
        "b_dec": torch.zeros(d, device=directions.device),
    }
    if weights.has("thresholds"):
        reached = weights.vector("thresholds", n).exp()
        return build("JumpReLUSAE", {}, {**tensors, "threshold": _just_below(reached)}, weights.origin)
    if "threshold" in weights.config:
        reached = torch.tensor(weights.number("threshold")).expand(n)
        return build("JumpReLUSAE", {}, {**tensors, "threshold": _just_below(reached)}, weights.origin)
    return build("TopKSAE", {"k": weights.whole("top_k", "k")}, tensors, weights.origin)


def _just_below(threshold: torch.Tensor) -> torch.Tensor:
    """A latent that reaches its threshold is active there; with us it has to be above."""
    below = torch.full_like(threshold, -torch.inf)
    return torch.nextafter(threshold, below).clamp(min=0)


FORMAT = Format(
    "overcomplete",
    "overcomplete, jrsh44 (state dicts)",
    "k largest of `ReLU(W_enc x + b_enc)`, or those at or above a threshold",
    (Signature((ENCODER, "encoder.final_block.0.bias", DICTIONARY), optional=("dictionary.multiplier", "thresholds")),),
    _convert,
)
