"""dictionary_learning: its classes by the names of their tensors, and TopK and BatchTopK by `dict_class` alone."""

from __future__ import annotations

from typing import Any

import torch

from ...saes import SparseAutoencoder
from ..weights import Weights, build, without_shift
from .base import TRANSFORMER_LENS, Format, Signature

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
GATED = ("decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight")
MATRYOSHKA = (*TRANSFORMER_LENS, "threshold", "k", "group_sizes")
BY_TENSORS = {
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "GatedAutoEncoder": GATED,
    "MatryoshkaBatchTopKSAE": MATRYOSHKA,
    "JumpReluAutoEncoder": (*TRANSFORMER_LENS, "threshold"),
}
"""Classes that nobody else has the tensors of; the others have to be named by `dict_class`."""


def _told_class(weights: Weights) -> Any:
    """The class that the config names."""
    return weights.section("trainer").config.get("dict_class", weights.config.get("dict_class"))


def _fits(weights: Weights) -> bool:
    """ReLU SAEs have the tensors of RE-N-Y, and JumpReLU SAEs those of ours, but for how their encoder lies."""
    told = {"trainer", "dict_class"} & set(weights.config)
    if weights.has("threshold", "W_enc", "b_enc") and not weights.has("k"):
        lies = weights.tensors["W_enc"].shape[-1:] == weights.tensors["b_enc"].shape
        return bool(told) or (lies and "_class_name" not in weights.config)
    return bool(told) or not weights.has("bias")


def _convert(weights: Weights) -> SparseAutoencoder:
    named = _told_class(weights)
    shown = [name for name, tensors in BY_TENSORS.items() if set(tensors) == set(weights.tensors)]
    name = shown[0] if named is None and shown else named
    converters = {
        "AutoEncoder": _relu,
        "AutoEncoderNew": _relu,
        "GatedAutoEncoder": _gated,
        "JumpReluAutoEncoder": _jump_relu,
        "MatryoshkaBatchTopKSAE": _matryoshka,
        "AutoEncoderTopK": _topk,
        "BatchTopKSAE": _batch_topk,
    }
    if isinstance(name, str) and name in converters:
        return converters[name](weights)
    raise weights.refuse(
        f"does not tell its class; pass config={{'dict_class': ...}}, one of {', '.join(converters)}"
        if name is None
        else f"is a {name}, which is not known; known are {', '.join(converters)}"
    )


def _relu(weights: Weights) -> SparseAutoencoder:
    """`AutoEncoder` gets unit directions there, the norms go into its encoder; `AutoEncoderNew` subtracts nothing."""
    new = weights.has("decoder.bias")
    found = weights.parts(*LINEAR, "decoder.bias" if new else "bias", turned="W_dec")
    if new:
        found["b_enc"] = without_shift(found["W_enc"], found["b_enc"], found["b_dec"])
        return build("ReLUSAE", {}, found, weights.origin)
    norms = found["W_dec"].norm(dim=-1)
    if norms.is_meta or not torch.allclose(norms, torch.ones_like(norms)):
        found |= {
            "W_dec": found["W_dec"] / norms[:, None],
            "W_enc": found["W_enc"] * norms[:, None],
            "b_enc": found["b_enc"] * norms,
        }
    return build("ReLUSAE", {}, found, weights.origin)


def _gated(weights: Weights) -> SparseAutoencoder:
    found = weights.parts("encoder.weight", "gate_bias", "decoder.weight", "decoder_bias", turned="W_dec")
    n = len(found["b_enc"])
    found |= {"r_mag": weights.vector("r_mag", n), "b_mag": weights.vector("mag_bias", n)}
    return build("GatedSAE", {}, found, weights.origin)


def _jump_relu(weights: Weights) -> SparseAutoencoder:
    """`b_dec` is not subtracted, unless the config says so; a ReLU stands behind the threshold."""
    found = weights.parts(*TRANSFORMER_LENS, turned="W_enc")
    if not weights.config.get("apply_b_dec_to_input"):
        found["b_enc"] = without_shift(found["W_enc"], found["b_enc"], found["b_dec"])
    found["threshold"] = weights.vector("threshold", len(found["b_enc"])).clamp(min=0)
    return build("JumpReLUSAE", {}, found, weights.origin)


def _topk(weights: Weights) -> SparseAutoencoder:
    """It has a threshold for another way of inference, which is not the class's own."""
    found = weights.parts(*LINEAR, "b_dec", turned="W_dec")
    return build("TopKSAE", {"k": weights.whole_tensor("k")}, found, weights.origin)


def _batch_topk(weights: Weights) -> SparseAutoencoder:
    found = weights.parts(*LINEAR, "b_dec", turned="W_dec")
    return build("BatchTopKSAE", {"k": weights.whole_tensor("k")}, found | _threshold(weights), weights.origin)


def _matryoshka(weights: Weights) -> SparseAutoencoder:
    found = weights.parts(*TRANSFORMER_LENS, turned="W_enc") | _threshold(weights)
    arguments = {"k": weights.whole_tensor("k"), "prefixes": _prefixes(weights)}
    return build("MatryoshkaSAE", arguments, found, weights.origin)


def _prefixes(weights: Weights) -> list[int] | None:
    sizes = weights.tensor("group_sizes")
    if sizes.is_floating_point() or sizes.is_complex() or sizes.ndim != 1:
        raise weights.refuse("has group_sizes that are no list of whole numbers; fetch the SAE again")
    return None if sizes.is_meta else sizes.cumsum(0).tolist()


def _threshold(weights: Weights) -> dict[str, torch.Tensor]:
    stored = weights.scalar("threshold")
    value = weights.number("threshold") if "threshold" in weights.config else stored
    if value < 0:
        raise weights.refuse(
            f"has the threshold {value:g}, which says that it was never set; pass config={{'threshold': ...}}"
        )
    return {"threshold": torch.full_like(weights.tensor("threshold"), value, dtype=torch.float32).reshape(())}


FORMAT = Format(
    "dictionary_learning",
    "dictionary_learning",
    "ReLU, gated, JumpReLU (`b_dec` not subtracted), per-row TopK, BatchTopK and Matryoshka by their threshold",
    (
        Signature((*LINEAR, "bias")),
        Signature((*LINEAR, "b_dec", "k"), buffers=("threshold",)),
        *(Signature(names) for names in BY_TENSORS.values()),
    ),
    _convert,
    fits=_fits,
)
