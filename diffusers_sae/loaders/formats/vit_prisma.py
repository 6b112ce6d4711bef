"""ViT-Prisma: SAEs of vision transformers; rows may be normalized first, then `b_dec` is subtracted."""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import TRANSFORMER_LENS, TRANSFORMER_LENS_GATED, Format, Signature

NORMS = {"none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
OWN_FIELDS = ("hook_point_layer", "layer_subtype", "hook_point", "vit_model_cfg")


def _convert(weights: Weights) -> SparseAutoencoder:
    arguments = {"input_norm": NORMS[weights.choice("normalize_activations", NORMS, "none")]}
    weights.choice("activation_fn_str", ("relu",), "relu")
    if weights.choice("architecture", ("standard", "vanilla", "gated"), "standard") != "gated":
        return build("ReLUSAE", arguments, weights.parts(*TRANSFORMER_LENS, turned="W_enc"), weights.origin)
    tensors = weights.parts("W_enc", "b_gate", "W_dec", "b_dec", turned="W_enc")
    tensors |= {name: weights.vector(name, len(tensors["b_enc"])) for name in ("r_mag", "b_mag")}
    return build("GatedSAE", arguments, tensors, weights.origin)


FORMAT = Format(
    "vit_prisma",
    "ViT-Prisma",
    "ReLU or gated, of rows that `normalize_activations` made, minus `b_dec`",
    (Signature(TRANSFORMER_LENS), Signature(TRANSFORMER_LENS_GATED)),
    _convert,
    marks=OWN_FIELDS,
)
