"""Our own format: `config.json` with `_class_name`, and the tensors of that class by their names.

A bare state dict of ours tells its class by its tensors. TopK and ReLU SAEs have the same, of which TopK's need a `k`.
"""

from __future__ import annotations

from ...saes import SparseAutoencoder
from ..weights import Weights, build
from .base import TRANSFORMER_LENS, Format, Signature

ELSEWHERE = ("cfg", "trainer", "architecture", "schema")
"""What configs of others tell and ours don't."""
GATED = (*TRANSFORMER_LENS, "r_mag", "b_mag")


def _lie_the_same_way(weights: Weights) -> bool:
    """Both matrices are `(n, d)`; of others' files with the same names, one is `(d, n)`."""
    return weights.has("W_enc", "W_dec") and weights.tensors["W_enc"].shape == weights.tensors["W_dec"].shape


def _class(weights: Weights) -> str:
    told = weights.config.get("_class_name")
    if told is not None:
        return str(told)
    if weights.has("threshold"):
        return "JumpReLUSAE" if weights.tensors["threshold"].ndim else "BatchTopKSAE"
    return "GatedSAE" if weights.has("r_mag") else "TopKSAE"


def _convert(weights: Weights) -> SparseAutoencoder:
    left_out = ("format", "provenance")
    arguments = {name: value for name, value in weights.config.items() if name[:1] != "_" and name not in left_out}
    tensors = {name: weights.floating(name) for name in weights.tensors}
    sae = build(_class(weights), arguments, tensors, weights.origin)
    weights.used.clear()
    weights.used.update(sae.state_dict())
    return sae


FORMAT = Format(
    "diffusers_sae",
    "diffusers_sae",
    "as its `config.json` says",
    (Signature(TRANSFORMER_LENS), Signature((*TRANSFORMER_LENS, "threshold")), Signature(GATED)),
    _convert,
    bars=ELSEWHERE,
    fits=_lie_the_same_way,
    rows="W_dec",
    write=lambda sae, folder: sae.save_pretrained(folder),
)
