"""Our own layout: `config.json` with `_class_name`, and the tensors of that class by their names."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import Format

ELSEWHERE = {"cfg", "trainer", "architecture", "schema"}
"""What configs of others tell and ours don't."""


def _recognizes(weights: Weights) -> bool:
    if "_class_name" in weights.config:
        return True
    if not weights.has("W_enc", "W_dec") or ELSEWHERE & set(weights.config):
        return False
    return weights.tensors["W_enc"].shape == weights.tensors["W_dec"].shape


def _read(weights: Weights) -> SparseAutoencoder:
    kind = weights.config.get("_class_name", "TopKSAE")
    arguments = {name: value for name, value in weights.config.items() if name[:1] != "_" and name != "format"}
    return build(kind, arguments, weights.tensors, weights.origin)


FORMAT = Format(
    "diffusers_sae",
    "diffusers_sae",
    "as its `config.json` says",
    _recognizes,
    _read,
    rows="W_dec",
    write=lambda sae, folder: sae.save_pretrained(folder),
)
