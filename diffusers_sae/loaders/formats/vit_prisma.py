"""ViT-Prisma: SAEs of vision transformers; rows may be normalized first, then `b_dec` is subtracted."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import TRANSFORMER_LENS, Format

NORMS = {None: None, "none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
OWN_FIELDS = {"hook_point_layer", "layer_subtype", "hook_point", "vit_model_cfg"}


def _recognizes(weights: Weights) -> bool:
    return weights.has("W_enc", "W_dec", "b_dec") and bool(OWN_FIELDS & set(weights.config))


def _read(weights: Weights) -> SparseAutoencoder:
    config = weights.config
    norm = config.get("normalize_activations", "none")
    if norm not in NORMS:
        raise weights.refuse(f"has normalize_activations = {norm!r}; known are {', '.join(filter(None, NORMS))}")
    function = config.get("activation_fn_str", "relu")
    if function != "relu":
        raise weights.refuse(f"has the activation {function!r}; known is relu")
    arguments = {"input_norm": NORMS[norm]}
    architecture = config.get("architecture", "standard")
    if architecture in ("standard", "vanilla"):
        return build("ReLUSAE", arguments, weights.parts(*TRANSFORMER_LENS, turned="W_enc"), weights.origin)
    if architecture == "gated":
        tensors = dict(weights.tensors) | {"b_enc": weights.vector("b_gate")}
        found = Weights(tensors, config, weights.origin).parts(*TRANSFORMER_LENS, turned="W_enc")
        n = len(found["b_enc"])
        found |= {name: weights.vector(name, n) for name in ("r_mag", "b_mag")}
        return build("GatedSAE", arguments, found, weights.origin)
    raise weights.refuse(f"has the architecture {architecture!r}; known are standard, vanilla and gated")


FORMAT = Format(
    "vit_prisma",
    "ViT-Prisma",
    "ReLU or gated, of rows that `normalize_activations` made, minus `b_dec`",
    _recognizes,
    _read,
)
